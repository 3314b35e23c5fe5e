import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig

from pipeline.config import Config, parse_config
from pipeline.models import native_length, scaling_note


def config(base: Path, **context: object) -> Config:
    return parse_config(
        {
            "run": {"name": "a"},
            "model": {"base": str(base)},
            "context": {"length": 8192, **context},
            "attention": {"group_size": 16},
            "data": {"train": ["x"]},
            "optimization": {"steps": 1, "global_batch": 1, "warmup_steps": 0},
        }
    )


@pytest.fixture
def scaled(tmp_path: Path) -> Callable[[str], Path]:
    def write(rope_type: str) -> Path:
        rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 10000.0}
        published = LlamaConfig(max_position_embeddings=1024).to_dict() | {"rope_parameters": rope}
        (tmp_path / "config.json").write_text(json.dumps(published))
        return tmp_path

    return write


def test_a_linearly_scaled_base_may_read_more_than_it_says(scaled: Callable[[str], Path]) -> None:
    base = scaled("linear")
    assert "scaled by 4" in scaling_note(config(base))
    assert scaling_note(config(base)).endswith("set context.native_length=4096")
    assert native_length(config(base)) == 1024

    assert scaling_note(config(base, native_length=4096)) == ""
    assert native_length(config(base, native_length=4096)) == 4096


def test_other_bases_say_it_clearly(scaled: Callable[[str], Path]) -> None:
    assert scaling_note(config(scaled("dynamic"))) == ""
    assert scaling_note(config(Path("examples/tiny-llama").resolve())) == ""
