# shellcheck shell=bash
# What every node of a launched cluster exports. Their ~/.bashrc reads it, so that Ray's start commands, `ray exec` and
# `ray attach` have it alike.

export PATH="$HOME/venv/bin:$PATH"

# The token is in ~/.ray/auth_token. Named here and not left to Ray, which goes without a token where it finds none:
# with this a node that lacks it does not start.
export RAY_AUTH_MODE=token

# `ray job stop` kills a driver after 3 seconds; a run ends when its workers have saved the step that they are in.
export RAY_JOB_STOP_WAIT_TIME_S=600

# Base models have up to 140 GB: on the local disk they load in minutes, and the root disk stays small.
export HF_HUB_CACHE="$HOME/scratch/huggingface"

# Without it a collective that fails says nothing of the reason.
export NCCL_DEBUG=WARN
# NCCL takes the first network it finds, and leaves out only lo and docker by itself. These too end at the machine.
export NCCL_SOCKET_IFNAME=^lo,docker,br-,veth,virbr
