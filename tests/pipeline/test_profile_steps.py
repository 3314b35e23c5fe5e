import gzip
import json
from pathlib import Path

import torch
from upath import UPath

from pipeline.profile_steps import WARM_UP, StepProfiler


def run(profiler: StepProfiler, steps: int) -> None:
    for _ in range(steps):
        torch.ones(8) @ torch.ones(8)
        profiler.step()


def test_traces_as_many_steps_as_asked_for(tmp_path: Path) -> None:
    told: list[str] = []
    profiler = StepProfiler(UPath(tmp_path), 2, 3, told.append)
    run(profiler, WARM_UP + 2)
    assert not told
    run(profiler, 5)
    [line] = told
    path = tmp_path / "profile" / "attempt-2.json.gz"
    assert str(path) in line
    names = [event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 3
    assert any("aten::" in name for name in names)


def test_does_nothing_unless_asked(tmp_path: Path) -> None:
    profiler = StepProfiler(UPath(tmp_path), 1, 0, lambda line: None)
    run(profiler, 10)
    profiler.close()
    assert not list(tmp_path.iterdir())


def test_a_run_that_ends_before_leaves_what_there_is(tmp_path: Path) -> None:
    told: list[str] = []
    profiler = StepProfiler(UPath(tmp_path), 1, 5, told.append)
    run(profiler, WARM_UP + 1)
    profiler.close()
    profiler.close()
    assert len(told) == 1
    assert (tmp_path / "profile" / "attempt-1.json.gz").exists()
