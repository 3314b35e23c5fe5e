"""What does a checkpoint cost? How long a save holds up training, how much it writes and how fast; and a restore.

    python benchmarks/checkpoint.py             # the trainable state of LongLoRA on Llama 2 7B: 140 M parameters
    python benchmarks/checkpoint.py --quick     # a tenth of it

Two processes hold the state as ZeRO-2 cuts it, and save it as a run does: CheckpointWriter, Ray and the run's log. The
base is only shapes. In each round, in turns, they also copy as many bytes in memory, and write as many bytes to as many
files, all at once, with nothing but `write` and `fsync`. Nothing trains meanwhile: both writes have the machine alone,
and begin some seconds after the one before, as two saves of a run do.

Bounds, of the medians of the rounds' ratios: training is held up for at most 2 × the time of the copy; from then on to
the commit, bytes are written at 0.7 × the rate of the plain write or more. The files have at most 1.02 × the bytes of
masters and moments. The slower process counts.
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

from longlora.adapters import parameter_groups, trainable_report
from pipeline import checkpoints
from pipeline.checkpoint_writer import CheckpointWriter, parts
from pipeline.checkpoints import RunState
from pipeline.config import Config, load_config
from pipeline.models import build_model
from pipeline.optimizer import Fragment, ParameterState
from pipeline.session import ray_session
from pipeline.storage import run_folder
from pipeline.train_driver import start_run_log

WORLD_SIZE = 2
MOST_BLOCKED, MOST_BYTES, LEAST_RATE = 2.0, 1.02, 0.7
SETTLE_S = 3.0
"""Disks go on with what was deleted after `sync` has returned (TRIM), and with caches of their own."""
LLAMA_2_7B = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
QUICK = {"vocab_size": 8000, "hidden_size": 1024, "num_hidden_layers": 32, "num_attention_heads": 32}


class Rank:
    """One of the two processes: its part of the state, and what is timed of it."""

    def __init__(self, config: Config, run_log: Any, rank: int) -> None:
        torch.set_num_threads(1)
        meeting = run_folder(config).parent / "meeting"
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD_SIZE)
        self.folder, self.rank = run_folder(config), rank
        self.network = build_model(config, "meta").network
        self.fragments = list(share_of(self.network, rank))
        size = sum(part.numel() for _, fragment in self.fragments for part in parts(fragment.state))
        self.source, self.target = torch.rand(size), torch.ones(size)
        self.writer = CheckpointWriter(self.folder, self.network, run_log, config.checkpoint, rank, WORLD_SIZE)

    def facts(self) -> tuple[int, int]:
        """Parameters of the whole state, and bytes of this rank's part of it."""
        return trainable_report(self.network).trainable, self.target.nbytes

    def reserve(self) -> float:
        """Seconds in which the memory for snapshots is taken."""

        def reserved() -> None:
            self.writer.reserve(self.fragments)
            self.writer.wait()

        self.without_writer = memory_since_reset(reset=True)
        return timed(reserved)

    def copy(self) -> float:
        """Seconds of copying as many bytes as this rank saves, in memory that has been used before."""
        return timed(lambda: self.target.copy_(self.source))

    def save(self, step: int, attempt: int) -> dict[str, float]:
        """Seconds that training was held up, Unix times when it goes on and when all is done, MB that saving takes."""
        state = RunState(step, step, "packs", "base", "config", attempt, eval_loss=None)
        memory_since_reset(reset=True)
        blocked = timed(lambda: self.writer.save(state, iter(self.fragments), request=0))
        goes_on = time.time()
        self.writer.wait()
        taken = memory_since_reset() - self.without_writer
        return {"blocked": blocked, "goes_on": goes_on, "done": time.time(), "memory": taken / 1e6}

    def plain_write(self, sizes: list[int]) -> float:
        """Seconds of writing files of these sizes, all at once, with fsync."""
        data = self.target.numpy().view(np.uint8).data
        paths = [Path(f"{self.folder}/plain-{self.rank}-{number}") for number in range(len(sizes))]

        def write(path: Path, size: int) -> None:
            with path.open("wb") as file:
                file.write(data[:size])
                file.flush()
                os.fsync(file.fileno())

        with ThreadPoolExecutor() as pool:
            seconds = timed(lambda: list(pool.map(write, paths, sizes)))
        for path in paths:
            path.unlink()
        return seconds

    def restore(self) -> dict[str, float]:
        """Seconds of finding the newest checkpoint that verifies (on the first rank), and of reading it."""
        before = memory_since_reset(reset=True)
        verify = timed(lambda: None if self.rank else checkpoints.newest(self.folder))
        folder = checkpoints.step_folder(self.folder, checkpoints.steps(self.folder)[-1])
        load = timed(lambda: checkpoints.read_parameters(folder, self.network))
        return {"verify": verify, "load": load, "memory": (memory_since_reset() - before) / 1e6}


def share_of(network: torch.nn.Module, rank: int) -> Iterator[tuple[str, Fragment]]:
    """This rank's half of every group's state, as ZeRO-2 cuts it: the group's tensors in one row; random numbers."""
    for members in parameter_groups(network).values():
        total = sum(parameter.numel() for _, parameter in members)
        first, last = rank * total // WORLD_SIZE, (rank + 1) * total // WORLD_SIZE
        rows = [torch.rand(last - first) for _ in range(3)]
        begin = 0
        for name, parameter in members:
            end = begin + parameter.numel()
            start, stop = max(first, begin), min(last, end)
            if start < stop:
                pieces = (row[start - first : stop - first] for row in rows)
                yield name, Fragment(start - begin, ParameterState(*pieces))
            begin = end


def timed(work: Callable[[], object]) -> float:
    """Seconds of `work`, begun on both ranks at once."""
    dist.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memory_since_reset(reset: bool = False) -> int:
    """Bytes of memory of this process at the highest since the last reset; shared memory that it has touched counts."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def settle() -> None:
    """Until what was written or deleted before is no part of what is timed next: as between two saves of a run."""
    os.sync()
    time.sleep(SETTLE_S)


class Pair:
    """Both ranks, and the run's log that they write to."""

    def __init__(self, config: Config) -> None:
        self.folder = run_folder(config)
        run_log = start_run_log(config, self.folder)
        details = {"attention": "none"}
        self.attempt = ray.get(run_log.start_attempt.remote(WORLD_SIZE, 0, details))
        actor: Any = ray.remote(Rank).options(num_cpus=1)
        self.ranks = [actor.remote(config, run_log, rank) for rank in range(WORLD_SIZE)]

    def both(self, what: str, *arguments: Any) -> list[Any]:
        """What both ranks answer, asked at once."""
        return ray.get([getattr(rank, what).remote(*arguments) for rank in self.ranks])

    def save(self, step: int) -> dict[str, float]:
        settle()
        ranks = self.both("save", step, self.attempt)
        goes_on = min(rank["goes_on"] for rank in ranks)
        return {
            "blocked": max(rank["blocked"] for rank in ranks),
            "write": (self._checkpoint(step) / "manifest.json").stat().st_ctime - goes_on,
            "with_deletion": max(rank["done"] for rank in ranks) - goes_on,
            **{f"memory_{number}": rank["memory"] for number, rank in enumerate(ranks)},  # MB, the snapshot included
        }

    def plain_write(self, step: int) -> float:
        """Seconds of writing files as large as those of a checkpoint, by the ranks that wrote those."""
        sizes = {path.name: path.stat().st_size for path in self._checkpoint(step).iterdir()}
        last = sizes.pop("optimizer-2-of-2.safetensors")
        settle()
        first, second = self.ranks
        return max(ray.get([first.plain_write.remote(list(sizes.values())), second.plain_write.remote([last])]))

    def bytes_of(self, step: int) -> int:
        return sum(path.stat().st_size for path in self._checkpoint(step).iterdir())

    def _checkpoint(self, step: int) -> Path:
        return Path(str(checkpoints.step_folder(self.folder, step)))


def measure(config: Config, rounds: int) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Facts that hold for all rounds, and the rounds; the first save is a fact, not a round."""
    with ray_session(config):
        pair = Pair(config)
        [parameters, *_], local = zip(*pair.both("facts"), strict=True)
        reserve, first = max(pair.both("reserve")), pair.save(1)
        rows = []
        for step in range(2, rounds + 2):
            row = {"copy": max(pair.both("copy"))}
            if step % 2:
                row |= pair.save(step) | {"plain": pair.plain_write(step)}
            else:
                row |= {"plain": pair.plain_write(step - 1)} | pair.save(step)
            rows.append(row)
            print({name: round(value, 3) for name, value in row.items()}, flush=True)
        written = pair.bytes_of(rounds + 1)
        restores = [pair.both("restore") for _ in range(2)]
    facts = {
        "parameters": f"{parameters / 1e6:.1f} M",
        "state of the ranks": " and ".join(f"{size / 1e6:.0f} MB" for size in local),
        "bytes": round(written / sum(local), 5),
        "copy": f"{max(local) / statistics.median(row['copy'] for row in rows) / 1e9:.1f} GB/s a rank",
        "plain write": f"{written / statistics.median(row['plain'] for row in rows) / 1e9:.2f} GB/s",
        "memory taken beforehand": f"{reserve:.2f} s, in the background",
        "first save": f"held up {first['blocked']:.3f} s, write {first['write']:.2f} s",
    }
    for which, ranks in zip(("first", "again"), restores, strict=True):
        seconds = [max(rank[what] for rank in ranks) for what in ("verify", "load", "memory")]
        facts[f"restore, {which}"] = "verify {:.2f} s, load {:.2f} s, {:.0f} MB more memory".format(*seconds)
    return facts, rows


def judge(rows: list[dict[str, float]], written: float) -> Row:
    """Medians of the rounds' ratios, and whether the bounds hold. written: bytes of files over those of the state."""
    blocked = statistics.median(row["blocked"] / row["copy"] for row in rows)
    rate = statistics.median(row["plain"] / row["write"] for row in rows)
    held = {"blocked": blocked <= MOST_BLOCKED, "bytes": written <= MOST_BYTES, "rate": rate >= LEAST_RATE}
    missed = ", ".join(what for what, holds in held.items() if not holds)
    return {
        "blocked / copy": f"{blocked:.3f} (bound: {MOST_BLOCKED} at most)",
        "bytes / state": f"{written:.5f} (bound: {MOST_BYTES} at most)",
        "write rate / plain": f"{rate:.3f} (bound: {LEAST_RATE} at least)",
        "verdict": f"FAIL: {missed}" if missed else "PASS",
    }


def settings(scratch: str, shape: dict[str, int]) -> Config:
    """A run of LongLoRA's usual adapters on a base of this shape; it is never trained."""
    size = {"intermediate_size": shape["hidden_size"], "num_key_value_heads": shape["num_attention_heads"]}
    base = {"model_type": "llama", "tie_word_embeddings": False, **size, **shape}
    overrides = [f"run.storage={scratch}", "run.name=checkpoint", "model.base=null", f"model.architecture={base}"]
    overrides += ["model.tokenizer=examples/tiny-llama"]  # a config names one
    overrides += ["workers.gpus=0", f"workers.max={WORLD_SIZE}", f"workers.min={WORLD_SIZE}"]
    return load_config(None, [*overrides, "checkpoint.keep_last=1", "checkpoint.keep_best=0", "adapter.rank=8"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller state, to try the benchmark")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", default=".", help="checkpoints are written here and removed; the disk is measured")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-checkpoint.json and .md")
    return parser.parse_args()


def main() -> int:
    """0 if the bounds hold."""
    options = parse()
    with tempfile.TemporaryDirectory(dir=os.path.abspath(options.folder), prefix="checkpoint-") as scratch:
        facts, rows = measure(settings(scratch, QUICK if options.quick else LLAMA_2_7B), options.rounds)
    verdict = judge(rows, facts.pop("bytes"))
    facts = machine("cpu", **facts, **verdict)
    table = [{name: f"{value:.3f}" for name, value in row.items()} for row in rows]
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    print(as_table(table))
    if options.save:
        print(f"written to {save('checkpoint', 'What a checkpoint costs', facts, table)}")
    return 0 if verdict["verdict"] == "PASS" else 1


if __name__ == "__main__":
    sys.exit(main())
