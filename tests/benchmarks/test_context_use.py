from collections.abc import Callable
from pathlib import Path

import pytest
from upath import UPath

from benchmarks import context_use
from pipeline.config import Config
from pipeline.storage import read_json, write_atomic

MakeRun = Callable[..., tuple[Config, UPath]]


def copy_of(config: Config, run_folder: UPath, name: str, commit: Callable[..., UPath], **evaluation: object) -> UPath:
    """Another run on the same documents, with other weights."""
    folder = run_folder.parent / name
    other = config.model_copy(
        update={
            "run": config.run.model_copy(update={"name": name}),
            "evaluation": config.evaluation.model_copy(update=evaluation),
        }
    )
    write_atomic(folder / "config.yaml", other.to_yaml().encode())
    commit(other, folder, step=20)
    return folder


def test_runs_are_compared_on_the_same_blocks(
    make_run: MakeRun, commit_checkpoint: Callable[..., UPath], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, first = make_run()
    second = copy_of(config, first, "second", commit_checkpoint)
    monkeypatch.setattr("figures.RESULTS", tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["context_use.py", str(first), str(second), str(first), "--blocks", "6", "--save"])
    assert context_use.main() == 0
    [saved] = (tmp_path / "results").glob("*-context-use.json")
    report = read_json(UPath(saved))
    assert report["blocks"] == 6 and "context_use.py" in report["command"]
    losses = [(row["model"], row["context"], row["loss"]) for row in report["rows"]]
    assert [row[:2] for row in losses] == [(name, n) for name in ("tiny", "second", "tiny") for n in (256, 512)]
    assert losses[:2] == losses[4:], "the same run on the same blocks"
    assert losses[0][2] != losses[2][2]


def test_runs_that_measure_different_things_are_refused(
    make_run: MakeRun,
    commit_checkpoint: Callable[..., UPath],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, first = make_run()
    second = copy_of(config, first, "second", commit_checkpoint, lengths=[512])
    monkeypatch.setattr("sys.argv", ["context_use.py", str(first), str(second)])
    capsys.readouterr()
    assert context_use.main() == 2
    [error] = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"error: {second}: held-out documents, tokenizer, evaluation.lengths")
