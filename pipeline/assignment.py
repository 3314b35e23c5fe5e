"""What the driver tells its workers, and the error with which a worker ends a run."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Assignment:
    """What the driver tells every worker."""

    config: dict[str, Any]
    run_folder: str
    train_packs: str
    validation_packs: str | None
    base_fingerprint: str
    run_log: Any
    """Handle of the RunLog actor."""


class FinalError(RuntimeError):
    """An error that trying again would repeat: it ends the run. Its message is one line."""


@dataclass(frozen=True)
class CheckpointRequest:
    """What the driver asks of workers in training: a checkpoint now, and what comes after it."""

    number: int = 0
    """From 1; 0 asks for nothing."""
    hold: bool = False
    """Wait after it to be stopped."""
    end: bool = False
    """End the run after it, before its last step; with or without a number."""
