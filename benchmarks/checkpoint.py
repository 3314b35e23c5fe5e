"""What does a checkpoint cost? How long a save holds up training, what it writes and how fast, and how fast it is read.

    python benchmarks/checkpoint.py             # the trainable state of LongLoRA on Llama 2 7B, 140 M parameters
    python benchmarks/checkpoint.py --quick     # a sixteenth of it

Two processes hold the state as ZeRO-2 cuts it, and save it as a run does: CheckpointWriter, Ray and the run's log. The
base is only shapes. In each round they also copy the same bytes in memory, and write the same bytes to files of the
same sizes with nothing but `write` and `fsync`. Nothing trains meanwhile, so that both writes have the machine alone.

Bounds, of medians over the rounds after the first: training is held up by at most 2 × the time of the copy, on the
slower rank; files have at most 1.02 × the bytes of masters and moments; from the moment when training goes on to the
commit, bytes are written at 0.7 × the rate of the plain write or more.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from figures import Row, as_table, machine, save
from upath import UPath

from longlora.adapters import parameter_groups
from pipeline import checkpoints
from pipeline.checkpoint_writer import CheckpointWriter
from pipeline.checkpoints import RunState
from pipeline.config import Config, parse_config
from pipeline.models import build_model
from pipeline.optimizer import Fragment, ParameterState
from pipeline.session import ray_session
from pipeline.storage import run_folder
from pipeline.train_driver import start_run_log

WORLD_SIZE = 2
MOST_BLOCKED, MOST_BYTES, LEAST_RATE = 2.0, 1.02, 0.7


class Rank:
    """One of the two processes: its part of the state, and what is timed of it. An actor of Ray."""

    def __init__(self, config: Config, run_log: Any, meeting: str, rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD_SIZE)
        self.folder, self.rank = run_folder(config), rank
        self.network = build_model(config, "meta").network
        self.fragments = list(share_of(self.network, rank))
        self.bytes = sum(part.nbytes for _, fragment in self.fragments for part in parts(fragment))
        self.source, self.target = torch.rand(self.bytes // 4), torch.ones(self.bytes // 4)
        self.writer = CheckpointWriter(self.folder, self.network, run_log, config.checkpoint, rank, WORLD_SIZE)
        self.writer.reserve(self.fragments)
        self.writer.wait()

    def local_bytes(self) -> int:
        return self.bytes

    def copy(self) -> float:
        """Seconds of copying as many bytes as this rank saves, in memory that has been used before."""
        return timed(lambda: self.target.copy_(self.source))

    def save(self, step: int) -> dict[str, float]:
        """Seconds until training goes on, and from then to the end of the save; MB of memory taken meanwhile."""
        state = RunState(step, step, "packs", "base", "config", attempt=1, eval_loss=None)
        before = reset_peak_memory()
        blocked = timed(lambda: self.writer.save(state, iter(self.fragments), request=0))
        start = time.perf_counter()
        self.writer.wait()
        seconds = time.perf_counter() - start
        return {"blocked": blocked, "background": seconds, "memory": (peak_memory() - before) / 1e6}

    def plain_write(self, step: int) -> float:
        """Seconds of writing the bytes of this rank's files of a checkpoint, each to a file of its own, with fsync."""
        folder = checkpoints.step_folder(self.folder, step)
        mine = ["adapter_model", "optimizer-1-of-2"] if self.rank == 0 else ["optimizer-2-of-2"]
        sizes = [os.path.getsize(folder / f"{name}.safetensors") for name in mine]
        data = memoryview(self.target.numpy()).cast("B")  # type: ignore[arg-type]
        paths = [Path(str(self.folder)) / f"plain-{self.rank}-{i}" for i in range(len(sizes))]

        def write(path: Path, size: int) -> None:
            with path.open("wb", buffering=0) as file:
                for begin in range(0, size, 1 << 24):
                    file.write(data[begin : min(size, begin + (1 << 24))])
                os.fsync(file.fileno())

        def all_at_once() -> None:
            with ThreadPoolExecutor() as pool:
                list(pool.map(write, paths, sizes))

        seconds = timed(all_at_once)
        for path in paths:
            path.unlink()
        return seconds

    def restore(self) -> dict[str, float]:
        """Seconds of finding the newest checkpoint that verifies, and of reading it."""
        seconds = {"verify": timed(lambda: checkpoints.newest(self.folder)) if self.rank == 0 else timed(lambda: None)}
        [step] = checkpoints.steps(self.folder)[-1:]
        folder = checkpoints.step_folder(self.folder, step)
        before = reset_peak_memory()
        seconds["load"] = timed(lambda: checkpoints.read_parameters(folder, self.network))
        return seconds | {"memory": (peak_memory() - before) / 1e6}


def share_of(network: torch.nn.Module, rank: int) -> Iterator[tuple[str, Fragment]]:
    """This rank's half of every group's state, as ZeRO-2 cuts it: the group's tensors in one row; random numbers."""
    generator = torch.Generator().manual_seed(rank)
    for members in parameter_groups(network).values():
        sizes = {name: parameter.numel() for name, parameter in members}
        half = -(-sum(sizes.values()) // WORLD_SIZE)
        first, last = rank * half, min((rank + 1) * half, sum(sizes.values()))
        flat = [torch.rand(last - first, generator=generator) for _ in range(3)]
        begin = 0
        for name, size in sizes.items():
            start, stop = max(first, begin), min(last, begin + size)
            if start < stop:
                pieces = (row[start - first : stop - first] for row in flat)
                yield name, Fragment(start - begin, ParameterState(*pieces))
            begin += size


def parts(fragment: Fragment) -> tuple[torch.Tensor, ...]:
    return fragment.state.master, fragment.state.exp_avg, fragment.state.exp_avg_sq


def timed(work: Callable[[], object]) -> float:
    """Seconds of `work`, begun on both ranks at once."""
    dist.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def reset_peak_memory() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """Bytes of this process's memory at its peak since the reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def settings(scratch: str, quick: bool) -> Config:
    hidden, layers = (1024, 32) if quick else (4096, 32)
    return parse_config(
        {
            "run": {"name": "checkpoint", "storage": scratch},
            "model": {
                "architecture": {
                    **{"model_type": "llama", "vocab_size": 32000 if not quick else 8000, "hidden_size": hidden},
                    **{"intermediate_size": 2 * hidden, "num_hidden_layers": layers, "num_attention_heads": 32},
                    **{"num_key_value_heads": 32, "max_position_embeddings": 4096, "tie_word_embeddings": False},
                },
                "tokenizer": "none",
            },
            "context": {"length": 32768, "native_length": 4096},
            "attention": {"group_size": 8192},
            "adapter": {"rank": 8},
            "data": {"train": ["none"]},
            "optimization": {"steps": 1000, "global_batch": 64, "warmup_steps": 0},
            "workers": {"min": WORLD_SIZE, "max": WORLD_SIZE, "gpus": 0},
            "checkpoint": {"keep_last": 1, "keep_best": 0},
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.path.expanduser("~")) as scratch:
        config = settings(scratch, o.quick)
        with ray_session(config):
            log = start_run_log(config, run_folder(config))
            ranks = [ray.remote(Rank).options(num_cpus=1).remote(config, log, f"{scratch}/meeting", r) for r in range(2)]
            ray.get(log.start_attempt.remote(2, 0, {"attention": "none"}))
            call = lambda name, *a: ray.get([getattr(r, name).remote(*a) for r in ranks])
            print(call("local_bytes"))
            for step in range(1, o.rounds + 2):
                c = call("copy"); s = call("save", step); w = call("plain_write", step)
                total = sum(f.stat().st_size for f in (Path(scratch)/"checkpoint"/"checkpoints"/f"step-{step}").iterdir())
                print(c, s, w, total, total/sum(call("local_bytes")))
                print("blocked ratio", max(x["blocked"] for x in s)/max(c), "rate ratio", max(w)/max(x["background"] for x in s), flush=True)
            print(call("restore"), call("restore"))
            os.system(f"tail -3 {scratch}/checkpoint/ledger/*; ls -la {scratch}/checkpoint/checkpoints/*")
    return 0


if __name__ == "__main__":
    sys.exit(main())
