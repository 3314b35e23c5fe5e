"""What cannot be trained is refused: one clear line on stderr, exit 2, and nothing half-written."""

import json
import subprocess
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
    "missing file": (["data.train=[{tmp}/none.txt]"], "none.txt"),
    "unknown format": (["data.train=[{tmp}/word.docx]"], "word.docx"),
}
FOUND_WITH_RAY = {
    "empty corpus": (["data.train=[{tmp}/empty.txt]"], "nothing to train on in 1 documents (1 empty)"),
    "fewer sequences than a batch": (["data.train=[{tmp}/short.txt]"], "fewer than optimization.global_batch (5)"),
    "missing resources": (["workers.resources={TPU: 1}"], "each needs 1 TPU"),
}
IN_A_SMALL_DISK = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && shift 2 && exec "$@"'


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(
    mistake: str, make_run: Callable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides, named = MISTAKES[mistake]
    run = make_run("run")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "word.docx").write_text("")
    overrides = [text.replace("{tmp}", str(tmp_path)) for text in overrides]
    status = main(["train", "--config", str(run.config), *overrides])
    errors = capfd.readouterr().err.strip().splitlines()
    assert status == 2
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ") and named in errors[0]
    nothing_half_written(tmp_path)


@pytest.mark.parametrize("mistake", FOUND_WITH_RAY)
def test_a_mistake_that_ray_is_needed_for_is_one_line_too(mistake: str, make_run: Callable, tmp_path: Path) -> None:
    overrides, named = FOUND_WITH_RAY[mistake]
    run = make_run("run")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("A few words. " * 40)
    overrides = [text.replace("{tmp}", str(tmp_path)) for text in overrides]
    finished = subprocess.run(run.command("train", *overrides), capture_output=True, text=True)
    refused(finished, named)
    assert not run.folder.exists(), "a run that never started must not bind the next one to its settings"
    nothing_half_written(tmp_path)


@pytest.mark.parametrize(
    ("size", "named"),
    [
        ("40k", "run.storage cannot be written"),
        ("72k", "the shard cannot be written below run.storage"),
        ("700k", "run.storage cannot be written"),
        ("2m", "run.storage cannot be written"),
    ],
    ids=["tokenizer", "packs", "MLflow", "checkpoint"],
)
def test_a_full_disk_is_one_line(size: str, named: str, make_run: Callable, tmp_path: Path) -> None:
    run, disk = make_run("run"), tmp_path / "disk"
    disk.mkdir()
    space = ["unshare", "--mount", "--map-root-user", "sh", "-c", IN_A_SMALL_DISK, "sh"]
    try:
        subprocess.run([*space, "100k", str(disk), "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs `unshare --mount`, for a disk of its own that it can fill")
    command = run.command("train", f"run.storage={disk}")
    finished = subprocess.run([*space, size, str(disk), *command], capture_output=True, text=True)
    refused(finished, named)
    assert "No space left" in finished.stderr or "disk is full" in finished.stderr


def refused(finished: "subprocess.CompletedProcess[str]", named: str) -> None:
    assert finished.returncode == 2, finished.stderr
    errors = finished.stderr.strip().splitlines()
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ") and named in errors[0]


def nothing_half_written(folder: Path) -> None:
    committed = [path for path in folder.rglob("manifest.json") if path.parent.parent.name == "checkpoints"]
    assert not committed
    for manifest in folder.rglob("manifest.json"):
        json.loads(manifest.read_text())
    assert not [path for path in folder.rglob("*.tmp-*")]
