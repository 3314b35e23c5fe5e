"""The command `compare`: runs that MLflow has, side by side, whoever made them."""

import re
from argparse import ArgumentParser, Namespace
from datetime import UTC, datetime
from pathlib import Path

from pipeline.config import ConfigError, load_config
from pipeline.tracking_uri import check_tracking_uri


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="NAME_OR_ID",
        help="runs, and their children (default: all); section.key=value changes the config, e.g. run.storage=/folder",
    )
    parser.add_argument("--experiment", metavar="NAME", help="MLflow experiment (default: the config's)")
    parser.add_argument(
        "--filter", default="", help="in MLflow's language, in single quotes for the shell: 'metrics.`eval/loss` < 3.5'"
    )
    parser.add_argument(
        "--tag", action="append", default=[], metavar="KEY=VALUE", help="runs with this tag; repeatable"
    )
    parser.add_argument("--uri", help="MLflow server or database (default: the config's)")
    parser.add_argument("--metrics", nargs="+", default=[], metavar="METRIC", help="these instead of the usual ones")
    parser.add_argument("--html", metavar="FILE", help="write a page with table and plots")
    parser.add_argument("--csv", metavar="FILE", help="write a table, one row a run")
    parser.add_argument("--config", metavar="FILE", help="YAML file (default: configs/quickstart.yaml)")


OVERRIDE = re.compile(r"[a-z_]+\.[a-z_.]+=")
"""`section.key=value` among the names, as for other commands: where the runs are."""


def compare(options: Namespace) -> None:
    """Prints the table of the chosen runs, and writes what else is asked for; ConfigError for a mistake."""
    uri, experiment = _source(options)
    for option, file in (("--html", options.html), ("--csv", options.csv)):
        if file and not Path(file).absolute().parent.is_dir():
            raise ConfigError(f"{option} {file}: the folder {Path(file).absolute().parent} is not there")

    from rich.console import Console

    from pipeline.compare_report import comparison_csv, print_comparison
    from pipeline.compare_runs import Selection, read_runs

    names = [name for name in options.runs if not OVERRIDE.match(name)]
    selection = Selection(experiment, names, options.filter, options.tag)
    runs = read_runs(uri, selection, options.metrics, curves=bool(options.html))
    print_comparison(Console(), runs, options.metrics)
    if options.csv:
        _write("--csv", options.csv, comparison_csv(runs, options.metrics))
    if options.html:
        from pipeline.compare_page import comparison_page

        origin = f"experiment {experiment}, {uri}"
        _write("--html", options.html, comparison_page(runs, options.metrics, origin, datetime.now(UTC)))


def _source(options: Namespace) -> tuple[str, str]:
    """URI and experiment: those of the options, else those of the config."""
    from pipeline.tracking import tracking_uri

    if options.uri:
        try:
            check_tracking_uri(options.uri)
        except ValueError as error:
            raise ConfigError(str(error).replace("tracking.uri", "--uri", 1)) from None
        if options.experiment:
            return options.uri, options.experiment
    config = load_config(options.config, [setting for setting in options.runs if OVERRIDE.match(setting)])
    return options.uri or tracking_uri(config), options.experiment or config.tracking.experiment


def _write(option: str, file: str, text: str) -> None:
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option} {file}: {error.strerror}") from None
    print(f"{file} is written")
