"""Checkpoints that do not know the world size: commit, verify, restore, retention.

`checkpoints/step-<n>/` is the state after n steps. `manifest.json`, written last, is the commit: a folder without it,
or with a file that differs from what it lists, is no checkpoint and is never read.

    adapter_model.safetensors, adapter_config.json   fp32 masters in PEFT's form   (adapter.kind: lora)
    model.safetensors                                fp32 masters                  (adapter.kind: full)
    optimizer-<i>-of-<n>.safetensors                 both Adam moments, by parameter name
    config.json                                      the model's config, context extension included
    state.json                                       step, fingerprints, config hash, attempt, eval/loss
"""

import json
import re
import tempfile
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import cast

from peft import PeftModel
from safetensors import torch as safetensors
from torch import Tensor
from transformers import PreTrainedModel
from upath import UPath

from longlora.adapters import adapter_state, peft_key
from pipeline.config import ConfigError
from pipeline.optimizer import MOMENTS, ParameterState
from pipeline.storage import read_json, remove_tree, write_atomic

MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d+)$")
FORMAT = 1


@dataclass(frozen=True)
class RunState:
    """What a checkpoint says beside its tensors. `step` steps are done; `position` sequences have been trained."""

    step: int
    position: int
    packs_fingerprint: str
    base_fingerprint: str
    training_hash: str
    attempt: int
    eval_loss: float | None
    format: int = FORMAT


def save(
    run_folder: UPath, state: RunState, network: PeftModel | PreTrainedModel, parameters: dict[str, ParameterState]
) -> UPath:
    """Writes and commits `checkpoints/step-<state.step>/`; called on one rank, with the parameters in full.

    An uncommitted or damaged folder of the same step is replaced. OSError (e.g. a full disk) leaves no commit behind.
    """
    folder = run_folder / "checkpoints" / f"step-{state.step}"
    if folder.exists():
        remove_tree(folder)
    files = {**_network_files(network, parameters), **_optimizer_files(network, parameters)}
    files["state.json"] = _json(asdict(state))
    for name, data in files.items():
        write_atomic(folder / name, data)
    manifest = {name: {"size": len(data), "sha256": sha256(data).hexdigest()} for name, data in files.items()}
    write_atomic(folder / MANIFEST, _json({"format": FORMAT, "files": manifest}))
    return folder


def steps(run_folder: UPath) -> list[int]:
    """Steps of the folders that have a manifest, ascending; their files have not been verified."""
    folder = run_folder / "checkpoints"
    if not folder.exists():
        return []
    matches = [STEP_FOLDER.search(path.name) for path in folder.iterdir() if (path / MANIFEST).exists()]
    return sorted(int(match[1]) for match in matches if match)


def newest(run_folder: UPath) -> UPath | None:
    """The newest checkpoint that verifies, or None."""
    for step in reversed(steps(run_folder)):
        folder = run_folder / "checkpoints" / f"step-{step}"
        if not damage(folder):
            return folder
    return None


def damage(folder: UPath) -> str:
    """What is wrong with a committed checkpoint, in words; empty if every file is as its manifest says."""
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        for name, expected in manifest["files"].items():
            data = (folder / name).read_bytes()
            if len(data) != expected["size"] or sha256(data).hexdigest() != expected["sha256"]:
                return f"{name} differs from the manifest"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def read_state(folder: UPath) -> RunState:
    return RunState(**read_json(folder / "state.json"))


def read_parameters(folder: UPath, network: PeftModel | PreTrainedModel) -> dict[str, ParameterState]:
    """The parameter states of a verified checkpoint, by the names of `network`'s trainable parameters."""
    lora = isinstance(network, PeftModel)
    masters = _load(folder / ("adapter_model.safetensors" if lora else "model.safetensors"))
    moments: dict[str, Tensor] = {}
    for path in folder.glob("optimizer-*.safetensors"):
        moments |= _load(path)
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    key = {name: peft_key(name) if lora else name for name in names}
    missing = [name for name in names if key[name] not in masters]
    if missing:
        raise ConfigError(f"{folder}: has no weights for {missing[0]}: adapter settings differ from those of the run")
    return {
        name: ParameterState(masters[key[name]], *(moments[f"{key[name]}/{moment}"] for moment in MOMENTS))
        for name in names
    }


def retain(run_folder: UPath, keep_last: int, keep_best: int) -> list[int]:
    """Deletes all but the newest `keep_last` and the `keep_best` of lowest eval/loss; returns the deleted steps."""
    present = steps(run_folder)
    folders = {step: run_folder / "checkpoints" / f"step-{step}" for step in present}
    losses = {step: read_state(folder).eval_loss for step, folder in folders.items()}
    scored = sorted((loss, step) for step, loss in losses.items() if loss is not None)
    kept = set(present[-keep_last:]) | {step for _, step in scored[:keep_best]}
    dropped = [step for step in present if step not in kept]
    for step in dropped:
        (folders[step] / MANIFEST).unlink()  # first: a folder that is half deleted must not look committed
        remove_tree(folders[step])
    return dropped


def check_resumable(state: RunState, packs_fingerprint: str, base_fingerprint: str) -> None:
    """ConfigError with the reason if a checkpoint belongs to other data or another base model."""
    for what, saved, current in (
        ("the packs", state.packs_fingerprint, packs_fingerprint),
        ("the base weights", state.base_fingerprint, base_fingerprint),
    ):
        if saved != current:
            raise ConfigError(
                f"run.name: {what} differ from those that the run was trained on ({saved} then, {current} now); "
                "give the run another name, or the old data"
            )


def base_fingerprint(folder: str) -> str:
    """Hash of a model folder's weight files: names, sizes, first and last MiB. A hub name stands for itself."""
    digest = sha256()
    files = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    if not files:
        return folder
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _network_files(network: PeftModel | PreTrainedModel, parameters: dict[str, ParameterState]) -> dict[str, bytes]:
    masters = {name: state.master for name, state in parameters.items()}
    if isinstance(network, PeftModel):
        return {
            "adapter_model.safetensors": safetensors.save(adapter_state(masters, network), {"format": "pt"}),
            "adapter_config.json": _adapter_config(network),
            "config.json": cast(PreTrainedModel, network.get_base_model()).config.to_json_string().encode(),
        }
    return {
        "model.safetensors": safetensors.save(masters, {"format": "pt"}),
        "config.json": network.config.to_json_string().encode(),
    }


def _optimizer_files(network: PeftModel | PreTrainedModel, parameters: dict[str, ParameterState]) -> dict[str, bytes]:
    key = peft_key if isinstance(network, PeftModel) else str
    moments = {
        f"{key(name)}/{moment}": getattr(state, moment) for name, state in parameters.items() for moment in MOMENTS
    }
    return {"optimizer-1-of-1.safetensors": safetensors.save(moments)}


def _adapter_config(network: PeftModel) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        network.active_peft_config.save_pretrained(folder)
        return (Path(folder) / "adapter_config.json").read_bytes()


def _load(path: UPath) -> dict[str, Tensor]:
    return safetensors.load(path.read_bytes())


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
