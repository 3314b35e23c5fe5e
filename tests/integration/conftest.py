"""Real runs, small: a random Llama of some thousand weights on one of the example books, through the command line."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml
from upath import UPath

from pipeline.config import REPOSITORY
from pipeline.ledger import StepRecord, read_ledger

TINY = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
RUN_TIMEOUT_S = 600  # a hang, not a slow start: on two cores a run of eight steps takes minutes, most of them to start
ORPHAN_TIMEOUT_S = 60


@dataclass
class Run:
    """One run directory and the processes that worked on it."""

    config: Path
    folder: UPath
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, *arguments: str) -> list[str]:
        stage, *overrides = arguments
        main = str(REPOSITORY / "pipeline" / "main.py")
        return [sys.executable, main, stage, "--config", str(self.config), *overrides]

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.command(*arguments),
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, *arguments: str) -> str:
        """Runs to the end and returns what was printed; fails the test if the command failed."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=RUN_TIMEOUT_S)
        assert process.returncode == 0, output
        return output

    def kill_after_step(self, step: int, *arguments: str) -> None:
        """Starts the command and kills the driver without notice once `step` is in the ledger."""
        process = self.start(*arguments)
        until = time.monotonic() + RUN_TIMEOUT_S
        while not any(record.step >= step for record in self.records()):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until, "no step in time"
            time.sleep(0.05)
        # Ray's processes notice that their driver is gone, but not at once: what they still commit belongs to this run.
        orphans = [child for child in psutil.Process(process.pid).children(recursive=True) if writes(child)]
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        _, alive = psutil.wait_procs(orphans, timeout=ORPHAN_TIMEOUT_S)
        assert not alive, [orphan.name() for orphan in alive]

    def records(self) -> list[StepRecord]:
        """The steps of the run's ledger in the order written, redone ones again."""
        return [line for _, line in read_ledger(self.folder) if isinstance(line, StepRecord)]


def writes(process: psutil.Process) -> bool:
    """Whether it writes into the run's folder: workers and RunLog. Ray's own agents stay for minutes, harmlessly."""
    with suppress(psutil.NoSuchProcess):
        return any(part.startswith(("ray::RayTrainWorker", "ray::RunLog")) for part in process.cmdline()[:1])
    return False


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """make_run(name, section={key: value, …}) → Run"""

    def make(name: str, **sections: dict[str, object]) -> Run:
        values: dict[str, dict[str, object]] = {
            "run": {"name": name, "storage": str(tmp_path / "storage")},
            "model": {
                "architecture": TINY,
                "tokenizer": "examples/tiny-llama",
                "dtype": "float32",
                "activations": "keep",
            },
            "context": {"length": 128},
            "attention": {"group_size": 32, "full_last": 0.25},
            "adapter": {"rank": 4},
            "data": {"train": [str(tmp_path / "book.txt")]},
            "optimization": {
                "steps": 8,
                "global_batch": 5,
                "micro_batch": 2,
                "learning_rate": 0.01,
                "warmup_steps": 2,
            },
            "workers": {"min": 2, "max": 2, "gpus": 0},
            "checkpoint": {"every_steps": 2},
        }
        for section, settings in sections.items():
            values[section] = {**values.get(section, {}), **settings}
        book = next((REPOSITORY / "examples" / "books" / "train").glob("*.txt"))
        (tmp_path / "book.txt").write_text(book.read_text(encoding="utf-8")[:60000], encoding="utf-8")
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return Run(path, UPath(tmp_path) / "storage" / name)

    yield make
