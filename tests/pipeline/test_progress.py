import threading
from types import SimpleNamespace

import pytest
import ray

from pipeline.progress import show_progress, status_line
from pipeline.run_log import Status


def test_the_status_line_says_where_a_run_is() -> None:
    status = Status(
        phase="training",
        step=12,
        steps=40,
        loss=3.9124,
        tokens_per_second=2210.4,
        world_size=2,
        remaining_s=372.0,
        attempt=1,
    )
    assert status_line(status) == "training  step 12/40 · loss 3.912 · 2,210 tokens/s · 2 workers · 6:12 left"


def test_before_the_first_step_it_shows_what_is_known() -> None:
    assert status_line(Status(steps=40)) == "starting workers  step 0/40"


def test_without_a_terminal_it_prints_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The backend once, then a line for each change, and the last state at the end."""
    states = [
        Status(steps=4),
        Status("training", 1, 4, attempt=1, setup={"attention": "sdpa (varlen: needs a CUDA device)"}),
    ]
    states += [states[1], Status("training", 4, 4, attempt=1, setup={"attention": "sdpa"})]
    finished = threading.Event()
    ask = SimpleNamespace(remote=lambda: states.pop(0))
    monkeypatch.setattr("pipeline.progress.PLAIN_INTERVAL_S", 0.01)

    def get(status: Status) -> Status:
        if len(states) == 1:
            finished.set()
        return status

    monkeypatch.setattr(ray, "get", get)
    show_progress(SimpleNamespace(status=ask), finished)
    assert capsys.readouterr().out.splitlines() == [
        "starting workers  step 0/4",
        "attention: sdpa (varlen: needs a CUDA device)",
        "training  step 1/4",
        "training  step 4/4",
    ]
