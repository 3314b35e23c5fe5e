"""What is refused before Ray starts: one clear line on stderr, exit 2, and nothing half-written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.main import main

MISTAKES = {
    "target shorter than native": (["context.length=32"], "32"),
    "no attention interface": (["model.architecture={model_type: xlnet}"], "xlnet"),
    "no language model": (["model.architecture={model_type: t5}"], "t5"),
    "vocabulary mismatch": (["model.architecture.vocab_size=1000"], "1000"),
    "no tokenizer": (["model.tokenizer={tmp}"], "model.tokenizer"),
    "no model": (["model.architecture=null", "model.base={tmp}/none"], "none"),
    "unwritable storage": (["run.storage={tmp}/empty.txt/x"], "run.storage"),
    "unknown LoRA target": (["adapter.targets=[nothing_proj]"], "nothing_proj"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(
    mistake: str, make_run: Callable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides, named = MISTAKES[mistake]
    run = make_run("run")
    (tmp_path / "empty.txt").write_text("")
    overrides = [text.replace("{tmp}", str(tmp_path)) for text in overrides]
    status = main(["train", "--config", str(run.config), *overrides])
    errors = capfd.readouterr().err.strip().splitlines()
    assert status == 2
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ") and named in errors[0]
    committed = [path for path in tmp_path.rglob("manifest.json") if path.parent.parent.name == "checkpoints"]
    assert not committed
    for manifest in tmp_path.rglob("manifest.json"):
        json.loads(manifest.read_text())
    assert not [path for path in tmp_path.rglob("*.tmp-*")]
