"""Runs side by side: what is pure with runs written down here, the command with MLflow's SQLite store."""

import csv
import io
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import compare_runs
from pipeline.compare_page import POLICY
from pipeline.compare_plots import Plot, plots, svg
from pipeline.compare_report import comparison_csv, print_comparison
from pipeline.compare_runs import Selection, read_runs
from pipeline.compare_values import (
    GPU_MEMORY,
    THROUGHPUT,
    TRAINING_LOSS,
    ComparedRun,
    History,
    Sample,
    by_step,
    by_time,
    by_tokens,
    columns,
    differing,
    families,
    labels,
    missing,
    partial,
    perplexities,
    thin,
)
from pipeline.config import ConfigError
from pipeline.main import main

NAN, INF = float("nan"), float("inf")


def run(name: str = "one", run_id: str = "", parent: str | None = None, **params: str) -> ComparedRun:
    return ComparedRun(run_id or name, name, "FINISHED", params, {}, parent)


def logged(curves: dict[str, list[tuple[int, float]]], name: str = "one") -> ComparedRun:
    """A run with a point a second of each metric, from the hundredth second on."""
    histories = {
        metric: History.of([Sample(step, 100.0 + n, value) for n, (step, value) in enumerate(points)])
        for metric, points in curves.items()
    }
    metrics = {metric: points[-1][1] for metric, points in curves.items()}
    return replace(run(name), metrics=metrics, histories=histories)


def test_only_settings_that_differ() -> None:
    runs = [
        run("a", rank="8", lr="0.001", seed="0", run_name="a"),
        run("b", rank="16", lr="1e-3", seed="0", run_name="b"),
        run("c", rank="8", lr="0.001", batch="4"),
    ]
    assert differing(runs) == {"rank": ["8", "16", "8"]}
    assert partial(runs) == {"seed": ["0", "0", None], "batch": [None, None, "4"]}


def test_children_come_after_their_parents() -> None:
    runs = [run("child", parent="parent"), run("a"), run("grandchild", parent="child"), run("parent"), run("b", "b")]
    assert [one.name for one in families(runs)] == ["a", "parent", "child", "grandchild", "b"]
    assert [one.name for one in families([run("child", parent="elsewhere")])] == ["child"]


def test_equal_names_are_told_apart() -> None:
    assert labels([run("a", "0123456789"), run("a", "abcdefghij"), run("b"), run("", "feedbeef00")]) == [
        "a (01234567)",
        "a (abcdefgh)",
        "b",
        "(feedbeef)",
    ]


def test_long_histories_are_thinned_and_keep_their_peak() -> None:
    samples = [Sample(n, float(n), 1.0) for n in range(25_001)]
    samples[12_346] = Sample(12_346, 12_346.0, 9.0)
    history = History.of(samples[::-1])
    assert len(history.samples) == 1000
    assert (history.samples[0], history.samples[-1]) == (samples[0], samples[-1])
    assert {later.step - one.step for one, later in zip(history.samples, history.samples[1:], strict=False)} == {25, 26}
    assert (history.peak, history.median) == (9.0, 1.0)
    assert thin(samples[:1000]) == samples[:1000]


def test_a_quantity_goes_by_many_names() -> None:
    for metric in ("train/loss", "loss", "train_loss", "training_loss"):
        assert TRAINING_LOSS.value(logged({metric: [(0, 3.0), (1, 2.0)]})) == 2.0
    trainer = logged({"train_loss": [(99, 3.3)], "loss": [(0, 4.0), (99, 2.7)]})
    assert TRAINING_LOSS.value(trainer) == 2.7, "its train_loss is the mean over the whole run"
    assert TRAINING_LOSS.value(logged({"eval_loss": [(0, 1.0)]})) is None
    assert THROUGHPUT.value(logged({"train/tokens_per_second": [(0, 10.0), (1, 6000.0), (2, 6200.0)]})) == 6000.0


def test_memory_is_the_highest_peak_of_all_devices_and_nodes() -> None:
    found = logged(
        {
            "system/gpu_0_memory_usage_megabytes": [(0, 20_000.0), (1, 9000.0)],
            "system/node-1/gpu_3_memory_usage_megabytes": [(0, 8000.0), (1, 23_500.0), (2, 100.0)],
            "system/gpu_0_memory_usage_percentage": [(0, 99_000.0)],
        }
    )
    assert GPU_MEMORY.value(found) == pytest.approx(23.5)
    assert GPU_MEMORY.value(logged({"system/gpu_0_memory_usage_gigabytes": [(0, 60.0)]})) == 60.0, "an AMD GPU"


def test_perplexity_is_compared_at_the_longest_length_that_all_have() -> None:
    short = logged({"eval/perplexity_512": [(9, 40.0)], "eval/perplexity_1024": [(9, 41.0)]})
    long = logged({"eval/perplexity_1024": [(9, 39.0)], "eval/perplexity_4096": [(9, 38.0)]})
    assert perplexities(long) == {1024: 39.0, 4096: 38.0}
    [column] = columns([short, long, run()])
    assert (column.title, list(column.values)) == ("perplexity at 1,024", [41.0, 39.0, None])
    assert [column.best(number) for number in range(3)] == [False, True, False]
    assert "perplexity by length" in missing([run()])


def test_points_by_step_and_by_time() -> None:
    redone = logged({"loss": [(0, 4.0), (1, 3.0), (1, 2.5), (2, NAN), (3, INF), (4, 2.0)]})
    assert by_step(redone, "loss") == [(0, 4.0), (1, 2.5), (4, 2.0)], "the last value of a step, where it is a number"
    assert by_time(redone, "loss") == [(0.0, 4.0), (1.0, 3.0), (2.0, 2.5), (5.0, 2.0)]
    assert by_step(logged({"loss": [(0, 4.0), (0, 3.0)]}), "loss") == [], "logged without steps"


def test_tokens_are_those_of_our_metrics_or_of_a_counter() -> None:
    ours = logged({"train/loss": [(0, 4.0), (1, 3.0)], "train/loss_by_tokens": [(16, 4.0), (32, 3.0)]})
    assert by_tokens(ours, "train/loss") == [(16, 4.0), (32, 3.0)]
    counted = {"loss": [(0, 4.0), (15, 3.0), (30, 2.0)], "num_input_tokens_seen": [(0, 0.0), (10, 100.0), (20, 300.0)]}
    assert by_tokens(logged(counted), "loss") == [(0.0, 4.0), (200.0, 3.0)], "nothing is guessed beyond the counter"
    assert by_tokens(logged({"loss": [(0, 4.0), (1, 3.0)]}), "loss") == []


def test_a_plot_is_there_where_its_metrics_are() -> None:
    assert plots([run()]) == []
    tokens = logged({"train/loss": [(0, 4.0), (1, 3.0)], "train/loss_by_tokens": [(16, 4.0), (32, 3.0)]})
    assert [plot.title for plot in plots([tokens])] == ["Training loss against tokens", "Training loss against time"]
    mixed = plots([tokens, logged({"loss": [(0, 4.0), (1, 3.0)]})])
    assert [(plot.title, list(plot.lines)) for plot in mixed] == [
        ("Training loss against tokens", [0]),
        ("Training loss against steps", [0, 1]),
        ("Training loss against time", [0, 1]),
    ]
    [chosen] = plots([logged({"f1": [(0, 0.1), (5, 0.9)]})], ["f1"])
    assert (chosen.title, chosen.lines) == ("f1 against steps", {0: [(0, 0.1), (5, 0.9)]})
    [single] = plots([logged({"run/goodput": [(30, 0.9)]})])
    assert single.bars and "90.0%" in svg(single, 0, ["one"])


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-3.0, 5.0], [1e-9, 1e9], [2.0] * 40])
@pytest.mark.parametrize("axis", ["tokens", "steps", "time", "length"])
def test_every_curve_can_be_drawn(values: list[float], axis: str) -> None:
    points = [(float(512 * (n + 1)), value) for n, value in enumerate(values)]
    for label in ("perplexity", "tokens/s", "GB", "share of the time", ""):
        drawn = svg(Plot("a title", axis, label, {0: points, 40: points}), 3, ["$\\frac{ <b>"] * 41)  # type: ignore[arg-type]
        assert drawn.startswith('<svg role="img"') and "<title>a title</title>" in drawn
        assert 'id="plot-3-run-40"' in drawn and "<b>" not in drawn
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawn)) <= set(re.findall(r'\bid="([^"]+)', drawn))


def printed(runs: list[ComparedRun], width: int, terminal: bool = True) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    print_comparison(console, runs, ())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_fits_into_the_terminal() -> None:
    many = [replace(logged({"loss": [(0, n / 7)]}, f"trial-{n}"), params={"rank": str(n)}) for n in range(30)]
    assert printed(many[:3], 80).splitlines()[1].split() == ["trial-0", "trial-1", "trial-2"], "side by side"
    assert printed(many, 80).splitlines()[1].split() == ["run", "rank", "training", "loss", "status"], "a row each"
    wide = [replace(one, params={f"setting.{n}": str(k) for n in range(9)}) for k, one in enumerate(many)]
    portions = printed(wide, 60)
    assert max(map(len, portions.splitlines()[:-3])) <= 60 and portions.count("setting.8") > 3
    assert all(f"trial-{n}" in portions for n in range(30))
    assert len(printed(wide, 60, terminal=False).splitlines()[1]) > 100, "a file takes lines of any length"


def test_a_name_cannot_control_the_terminal() -> None:
    text = printed([run("\x1b[2Jgone\r\n[bold]"), run("b")], 80)
    assert "\x1b" not in text and "�[2Jgone��[bold]" in text


def test_csv_has_a_row_a_run_and_no_formula() -> None:
    runs = [run('=cmd|"x"', run_id="1", lr="-0.5", note="-x"), run("b", run_id="2", lr="0.1", parent="1")]
    rows = list(csv.DictReader(io.StringIO(comparison_csv(runs, ()))))
    assert rows == [
        {"run_id": "1", "name": '\'=cmd|"x"', "status": "FINISHED", "parent_run_id": "", "lr": "-0.5", "note": "'-x"},
        {"run_id": "2", "name": "b", "status": "FINISHED", "parent_run_id": "1", "lr": "0.1", "note": ""},
    ]


@pytest.fixture(scope="module")
def logged_store(tmp_path_factory: pytest.TempPathFactory, log_runs: Callable[[str], None]) -> Path:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    log_runs(f"sqlite:///{path}")
    return path


@pytest.fixture
def uri(logged_store: Path, tmp_path: Path) -> str:
    shutil.copy(logged_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def names(uri: str, *runs: str, query: str = "", tags: tuple[str, ...] = ()) -> list[str]:
    found = read_runs(uri, Selection("mixed", runs, query, tags), (), curves=False)
    return [one.name[:8] for one in found]


def test_runs_are_chosen_by_name_id_tag_and_filter(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_runs, "PAGE", 2)
    everything = ["search", "trial-0", "trial-1", "trainer", "<script>"]
    assert names(uri) == everything
    assert names(uri, "trainer", "search") == ["trainer", "search", "trial-0", "trial-1"], "children are brought"
    assert names(uri, tags=("team=long context",)) == ["search"]
    assert names(uri, query="metrics.`eval/loss` < 3.2") == ["trial-0"]
    assert names(uri, "search", query="attributes.status = 'FAILED'") == ["trial-1"]
    [trainer] = read_runs(uri, Selection("mixed", ["trainer"]), (), curves=False)
    assert names(uri, trainer.run_id) == ["trainer"]
    by_id = read_runs(uri, Selection("no such experiment", [trainer.run_id]), (), curves=False)
    assert [one.name for one in by_id] == ["trainer"], "an id needs no experiment"


MISTAKES = {
    "no run 'tral-1' in experiment 'mixed'; did you mean 'trial-1'?": ["tral-1"],
    "no run has the id 00000000000000000000000000000000": ["0" * 32],
    "--filter: Invalid clause(s) in filter string: 'loss', '<'": ["--filter", "loss <"],
    "no run of experiment 'mixed' matches: tags.`a` = 'b'": ["--tag", "a=b"],
    "--tag a: give it as key=value": ["--tag", "a"],
    "--metrics: no run has 'eval/los'; there are eval/loss": ["--metrics", "eval/los"],
    "--csv /no/such/folder/a.csv: the folder /no/such/folder is not there": ["--csv", "/no/such/folder/a.csv"],
    "no experiment 'other'": ["--experiment", "other"],
    "--uri = 'mlruns': give a server": ["--uri", "mlruns"],
    "--uri carries credentials": ["--uri", "http://me:secret@host"],
    "no runs yet: /no/such.db is not there": ["--uri", "sqlite:////no/such.db"],
    "MLflow at 'http://127.0.0.1:9' does not answer: Connection refused": ["--uri", "http://127.0.0.1:9"],
}


@pytest.mark.parametrize(("line", "arguments"), MISTAKES.items())
def test_a_mistake_is_one_line(line: str, arguments: list[str], uri: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", *arguments, *defaults(uri, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}") and said.count("\n") == 1


def defaults(uri: str, arguments: list[str]) -> list[str]:
    chosen = [] if "--uri" in arguments else ["--uri", uri]
    return chosen if "--experiment" in arguments else [*chosen, "--experiment", "mixed"]


def test_nothing_is_made_or_brought_up_to_date(tmp_path: Path, uri: str) -> None:
    path = Path(uri.removeprefix("sqlite:///"))
    before = path.read_bytes()
    assert len(names(uri)) == 5
    assert path.read_bytes() == before
    with closing(sqlite3.connect(tmp_path / "old.db")) as database, database:
        database.execute("CREATE TABLE runs (run_uuid TEXT)")
    before = (tmp_path / "old.db").read_bytes()
    with pytest.raises(ConfigError, match="holds no runs, or those of an older MLflow"):
        names(f"sqlite:///{tmp_path}/old.db")
    assert (tmp_path / "old.db").read_bytes() == before


class Elements(HTMLParser):
    """Names and attributes of a page's elements, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_whole_and_harmless(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["compare", "--uri", uri, "--experiment", "mixed", "--html", str(tmp_path / "page.html")]
    assert main([*arguments, "--csv", str(tmp_path / "runs.csv")]) == 0
    page = Elements((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1 and "img" not in page.tags, "what runs are called stays text"
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    loaded = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value is None or value.startswith(("#", "data:")) for value in loaded)
    assert ("content", POLICY) in page.attributes and "script-src 'sha256-" in POLICY
    for title in (
        "Training loss against tokens",
        "Training loss against steps",
        "Training loss against time",
        "Evaluation loss against tokens",
        "Perplexity by context length",
        "Throughput against tokens",
        "GPU memory of the fullest device against time",
        "Goodput",
    ):
        assert title in page.texts
    assert "What no run has: peak host memory." in page.texts
    assert any(text.startswith("<script>document.title") for text in page.texts)
    assert len((tmp_path / "runs.csv").read_text(encoding="utf-8").splitlines()) == 6
    out = capsys.readouterr().out
    assert "attention.group_size" in out and "36.50" in out


def test_chosen_metrics_take_the_place_of_the_usual_ones(uri: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", "trainer", "--uri", uri, "--experiment", "mixed", "--metrics", "eval_loss"]) == 0
    out = capsys.readouterr().out
    assert "eval_loss" in out and "training loss" not in out


def test_where_the_runs_are_may_be_a_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As for other commands; and asking makes no file."""
    assert main(["compare", f"run.storage={tmp_path}/runs"]) == 2
    assert f"{tmp_path}/runs/mlflow.db is not there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
