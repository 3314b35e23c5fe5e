import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console
from upath import UPath

from longlora.perplexity import perplexity, windows
from pipeline import checkpoints, mlflow_run, models, tracking
from pipeline.config import Config, ConfigError
from pipeline.evaluation import (
    Evaluated,
    context_use_of,
    evaluate,
    evaluation_lengths,
    held_out_documents,
    select_targets,
)
from pipeline.stages import run_stages
from pipeline.storage import read_json

MakeRun = Callable[..., tuple[Config, UPath]]


def test_evaluate_writes_tables_plot_and_metrics(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    config, run_folder = make_run()
    evaluated = evaluate(config, run_folder)
    folder = Path(str(run_folder / "evaluation"))
    rows = json.loads((folder / "perplexity.json").read_text())
    assert [(row["model"], row["length"]) for row in rows] == [
        (model, length) for model in ("base", "base+rope", "extended") for length in (256, 512)
    ]
    assert {frozenset(row) for row in rows} == {
        frozenset({"model", "length", "perplexity", "perplexity_last256", "tokens"})
    }
    assert {row["tokens"] for row in rows} == {2048}
    assert len({row["perplexity"] for row in rows}) == len(rows)
    assert evaluated == Evaluated(10, {f"eval/perplexity_{row['length']}": row["perplexity"] for row in rows[-2:]})
    assert (folder / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("base+rope", "2,048", "last 256 tokens", f"{rows[-1]['perplexity']:.2f}"))


def test_rows_are_those_of_the_models(make_run: MakeRun) -> None:
    config, run_folder = make_run()
    evaluate(config, run_folder)
    rows = {
        (row["model"], row["length"]): row
        for row in json.loads((run_folder / "evaluation/perplexity.json").read_text())
    }
    pieces = windows(held_out_documents(config), 512, 512, 4)
    trained = models.trained_model(config, models.newest_checkpoint(run_folder))
    for name, model in (("base", models.base_model(config)), ("extended", trained)):
        result = perplexity(model, pieces, 512)
        assert rows[name, 512]["perplexity"] == pytest.approx(result.perplexity, rel=1e-6)
        assert rows[name, 512]["perplexity_last256"] == pytest.approx(result.perplexity_last256, rel=1e-6)


def test_context_use_file(make_run: MakeRun) -> None:
    config, run_folder = make_run()
    evaluate(config, run_folder)
    report = json.loads((run_folder / "evaluation" / "context_use.json").read_text())
    assert (report["block_tokens"], report["blocks"]) == (256, 6)
    assert [(row["model"], row["context"]) for row in report["rows"]] == [("extended", 256), ("extended", 512)]
    shortest, longest = report["rows"]
    assert (shortest["difference"], shortest["interval95"]) == (0, [0, 0])
    assert longest["difference"] == pytest.approx(longest["loss"] - shortest["loss"])
    assert longest["interval95"][0] < longest["difference"] < longest["interval95"][1]
    named = context_use_of(run_folder, blocks=6)
    assert [{**row, "model": "extended"} for row in named["rows"]] == report["rows"]


def test_done_evaluation_is_skipped_until_checkpoint_or_settings_change(
    make_run: MakeRun, commit_checkpoint: Callable[..., UPath], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run_folder = make_run(evaluation={"context_blocks": 0, "tokens": 512, "lengths": [64]})

    def measured(config: Config = config) -> bool:
        evaluated = evaluate(config, run_folder)
        assert evaluated and evaluated.step == checkpoints.read_state(models.newest_checkpoint(run_folder)).step
        assert list(evaluated.metrics) == [f"eval/perplexity_{length}" for length in config.evaluation.lengths]
        return "up to date" not in capsys.readouterr().out

    assert measured()
    assert not (run_folder / "evaluation" / "context_use.json").exists()
    assert not measured()
    (run_folder / "evaluation" / "state.json").unlink()  # as if it was killed before the end
    assert measured()
    commit_checkpoint(config, run_folder, step=20)
    assert measured()
    wider = config.evaluation.model_copy(update={"lengths": [64, 128]})
    assert measured(config.model_copy(update={"evaluation": wider}))


def test_what_mlflow_missed_it_gets_with_the_next_command(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run_folder = make_run(evaluation={"context_blocks": 0, "tokens": 512, "lengths": [64]})

    def unreachable(*_: object) -> None:
        raise ConnectionError("the server is gone")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow_run.MlflowRun, "keep_evaluation", unreachable)
        assert run_stages(config, "evaluate") == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"MLflow at {tracking.tracking_uri(config)} has not got all of this run (the server is gone): "
        "its next train or evaluate delivers it"
    )
    for _ in range(2):
        assert run_stages(config, "evaluate") == 0
    client = MlflowClient(tracking.tracking_uri(config))
    run_id = read_json(run_folder / "run.json")["mlflow_run_id"]
    [point] = client.get_metric_history(run_id, "eval/perplexity_64")
    assert (point.step, len(client.list_artifacts(run_id, "evaluation"))) == (10, 3)


def test_a_random_architecture_has_no_base_to_compare_with(make_run: MakeRun, tiny_base: Path) -> None:
    architecture = json.loads((tiny_base / "config.json").read_text()) | {"max_position_embeddings": 512}
    model = {"base": None, "architecture": architecture, "tokenizer": str(tiny_base)}
    config, run_folder = make_run("full", model=model, evaluation={"context_blocks": 0})
    evaluate(config, run_folder)
    rows = json.loads((run_folder / "evaluation" / "perplexity.json").read_text())
    assert [(row["model"], row["length"]) for row in rows] == [("extended", 512)]


@pytest.mark.parametrize(
    ("native", "target", "lengths"),
    [(512, 4096, [512, 1024, 2048, 4096]), (4096, 10000, [4096, 8192, 10000]), (512, 512, [512])],
)
def test_default_lengths(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, native: int, target: int, lengths: list[int]
) -> None:
    config, _ = make_run(context={"length": 16384})
    monkeypatch.setattr(models, "native_length", lambda config: native)
    config = config.model_copy(update={"context": config.context.model_copy(update={"length": target})})
    assert evaluation_lengths(config) == lengths


def test_lengths_beyond_every_document_are_left_out_and_named(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = make_run()
    targets = select_targets(config, [torch.arange(400)], Console())
    assert targets.lengths == [256]
    assert "lengths [512]" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"data\.validation: the longest document has 256 tokens.*one of 257"):
        select_targets(config, [torch.arange(256)], Console())


def test_too_few_blocks_are_refused_before_a_model_is_loaded(make_run: MakeRun) -> None:
    config, _ = make_run()
    with pytest.raises(ConfigError, match=r"evaluation\.context_blocks = 6: 2 blocks"):
        select_targets(config, [torch.arange(513 + 256)], Console())


def test_without_held_out_documents_nothing_is_evaluated(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    config, run_folder = make_run(data={"validation": []})
    assert evaluate(config, run_folder) is None
    assert "data.validation" in capsys.readouterr().out
    assert not (run_folder / "evaluation").exists()


def test_refuses_a_run_without_checkpoint(make_run: MakeRun) -> None:
    config, run_folder = make_run()
    with pytest.raises(ConfigError, match="no checkpoint"):
        evaluate(config, run_folder / "elsewhere")
