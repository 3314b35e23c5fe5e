from typing import Any

import pytest
import torch

from pipeline.assignment import FinalError
from pipeline.config import Config, ConfigError, parse_config
from pipeline.train_loop import group_size_at
from pipeline.train_worker import final_reason


def config(**attention: Any) -> Config:
    return parse_config(
        {
            "run": {"name": "a"},
            "model": {"base": "m"},
            "context": {"length": 64},
            "attention": {"group_size": 16, **attention},
            "data": {"train": ["x"]},
            "optimization": {"steps": 8, "global_batch": 2, "warmup_steps": 0},
        }
    )


@pytest.mark.parametrize(
    ("full_last", "expected"),
    [
        (0.0, [16] * 8),
        (0.25, [16] * 6 + [None] * 2),
        (1.0, [None] * 8),
    ],
)
def test_the_last_share_of_the_steps_has_full_attention(full_last: float, expected: list[int | None]) -> None:
    assert [group_size_at(step, config(full_last=full_last)) for step in range(8)] == expected


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "lower optimization.micro_batch"),
        (OSError(28, "No space left on device"), "run.storage cannot be written"),
        (ConfigError("the packs differ"), "the packs differ"),
        (FinalError("the loss is nan on sequences [3]"), "sequences [3]"),
        (ValueError("bad\nplan"), "bad plan"),
    ],
)
def test_errors_that_would_repeat_are_named_in_one_line(error: Exception, words: str) -> None:
    assert words in final_reason(error)
    assert "\n" not in final_reason(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("connection closed by peer"),
        OSError(5, "Input/output error"),
        ValueError("Default process group has not been initialized, please make sure to call init_process_group."),
    ],
)
def test_errors_that_may_pass_are_tried_again(error: Exception) -> None:
    assert final_reason(error) == ""
