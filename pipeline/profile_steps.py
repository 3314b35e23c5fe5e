"""A torch profiler trace of a few steps, for chrome://tracing or Perfetto."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from upath import UPath

from pipeline.storage import make_folder, write_atomic

WARM_UP = 3
"""Steps before the trace: kernels are compiled and memory is found in them."""


class StepProfiler:
    """Traces the steps after the first few of an attempt, and writes one file when they are done."""

    def __init__(self, folder: UPath, attempt: int, steps: int, say: Callable[[str], None]) -> None:
        """folder: the run's. steps: how many to trace; 0 does nothing."""
        self._path = folder / "profile" / f"attempt-{attempt}.json.gz"
        self._say = say
        self._left = WARM_UP + steps if steps else 0
        self._profile: profile | None = None
        if steps:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            plan = schedule(skip_first=WARM_UP - 1, wait=0, warmup=1, active=steps, repeat=1)
            self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
            self._profile.start()

    def step(self) -> None:
        """A step is done."""
        if self._profile is None:
            return
        self._profile.step()
        self._left -= 1
        if not self._left:
            self.close()

    def close(self) -> None:
        """Ends an unfinished trace; what there is of it is written."""
        running, self._profile = self._profile, None
        if running is not None:
            running.stop()

    def _write(self, finished: profile) -> None:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / self._path.name
            finished.export_chrome_trace(str(local))
            make_folder(self._path.parent)
            write_atomic(self._path, local.read_bytes())
        self._say(f"profile written to {self._path}: open it at https://ui.perfetto.dev")
