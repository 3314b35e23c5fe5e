"""The status line of a run: live in a terminal, a plain line now and then elsewhere."""

import sys
import threading
from contextlib import suppress
from typing import Any, Self

import ray
from ray.exceptions import RayActorError
from rich.console import Console
from rich.live import Live

from pipeline.run_log import Status

LIVE_INTERVAL_S = 0.5
PLAIN_INTERVAL_S = 10.0


def status_line(status: Status) -> str:
    """`training  step 12/40 · loss 3.912 · 2,210 tokens/s · 2 workers · 6:12 left`"""
    parts = [f"{status.phase}  step {status.step}/{status.steps}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.3f}")
    if status.eval_loss is not None:
        parts.append(f"held-out {status.eval_loss:.3f}")
    if status.tokens_per_second is not None:
        parts.append(f"{status.tokens_per_second:,.0f} tokens/s")
    if status.world_size:
        parts.append(f"{status.world_size} worker{'s' if status.world_size > 1 else ''}")
    if status.attempt > 1:
        parts.append(f"attempt {status.attempt}")
    if status.remaining_s is not None:
        minutes, seconds = divmod(round(status.remaining_s), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return " · ".join(parts)


def show_progress(run_log: Any, finished: threading.Event) -> None:
    """Shows the run's status until `finished` is set, and its last state then; nothing more once its log has died."""
    with suppress(RayActorError):
        _show(run_log, finished)


def _show(run_log: Any, finished: threading.Event) -> None:
    live = sys.stdout.isatty()
    with Live(refresh_per_second=4) if live else PlainLines() as display:
        attempt, told, ended = 0, 0, False
        while not ended:
            ended = finished.wait(LIVE_INTERVAL_S if live else PLAIN_INTERVAL_S)
            status: Status = ray.get(run_log.status.remote())
            if status.attempt > attempt:
                attempt = status.attempt
                for key, value in status.setup.items():
                    display.console.print(f"{key}: {value}", soft_wrap=True, highlight=False)
            for message in status.messages[told:]:
                display.console.print(message, soft_wrap=True, highlight=False, markup=False)
            told = len(status.messages)
            display.update(status_line(status))


class PlainLines:
    """In place of rich's Live where the output is no terminal: a line whenever it has changed."""

    def __init__(self) -> None:
        self.console = Console()
        self._shown = ""

    def update(self, line: str) -> None:
        if line != self._shown:
            print(line, flush=True)
        self._shown = line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
