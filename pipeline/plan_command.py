"""The command `plan`: options, one plan or a sweep of them."""

import argparse
import json
from pathlib import Path
from typing import Any

from pipeline.config import Config, ConfigError, load_config

SUFFIX = 1024  # of 8k, 100k


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", default="h100", help="h200, h100 (default), a100-80g, a100-40g, l40s, a10g, rtx-4090")
    parser.add_argument("--workers", type=int, metavar="N", help="GPUs (default: workers.max)")
    parser.add_argument("--price", type=float, metavar="X", help="of a GPU-hour on demand")
    parser.add_argument("--spot-price", type=float, metavar="X", help="of a GPU-hour that may be taken away")
    parser.add_argument(
        "--preemptions", type=float, default=0.05, metavar="X", help="losses of a spot machine an hour (default: 0.05)"
    )
    parser.add_argument(
        "--gpus-per-machine", type=int, default=1, metavar="N", help="which are lost together (default: 1)"
    )
    parser.add_argument("--sweep", metavar="KEY=A,B,…", help="a plan for each value, e.g. context.length=8k,32k,100k")
    parser.add_argument("--plot", metavar="FILE", help="picture of a sweep (default: plan-<KEY>.png)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--config", metavar="FILE", help="YAML file (default: configs/quickstart.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")


def plan(options: argparse.Namespace) -> int:
    """0, or 1 if the run (or one of a sweep) does not fit. ConfigError, one line, for what the user can mend."""
    config = load_config(options.config, options.overrides)
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: it must be at least 1")
    if options.gpus_per_machine < 1:
        raise ConfigError(f"--gpus-per-machine {options.gpus_per_machine}: it must be at least 1")
    if not options.sweep:
        return _one(config, options)
    key, _, values = options.sweep.partition("=")
    if not values:
        raise ConfigError(f"--sweep {options.sweep}: give a key and its values, e.g. context.length=8k,32k,100k")
    return _sweep(key, [_number(value) for value in values.split(",")], options)


def _one(config: Config, options: argparse.Namespace) -> int:
    from rich.console import Console

    from pipeline.plan_report import plan_json, plan_table

    made, preemptions = _made(config, options, {}), _preemptions(options)
    if options.json:
        print(json.dumps(plan_json(made, _prices(options), preemptions), indent=2))
    else:
        Console().print(plan_table(made, _prices(options), preemptions))
    return 0 if made.fits else 1


def _sweep(key: str, values: list[Any], options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import track

    from pipeline.plan_report import draw_sweep, plan_json, sweep_table

    counted: dict[str, Any] = {}
    unasked = "evaluation.lengths=[]"  # a plan needs none, and a recipe's are too long for a sweep's short contexts
    configs = [load_config(options.config, [*options.overrides, unasked, f"{key}={value}"]) for value in values]
    shown = track(configs, "planning", transient=True, disable=options.json)
    plans = list(zip(values, [_made(config, options, counted) for config in shown], strict=True))
    prices, preemptions = _prices(options), _preemptions(options)
    if options.json:
        print(json.dumps([{key: value} | plan_json(made, prices, preemptions) for value, made in plans], indent=2))
    else:
        Console().print(sweep_table(key, plans, prices, preemptions))
        path = Path(options.plot or f"plan-{key}.png")
        draw_sweep(key, plans, path)
        print(f"drawn to {path}")
    return 0 if all(made.fits for _, made in plans) else 1


def _made(config: Config, options: argparse.Namespace, counted: dict[str, Any]) -> Any:
    from pipeline.gpus import gpu_named
    from pipeline.plan import make_plan

    gpu = gpu_named(options.gpu)
    try:
        return make_plan(config, gpu, options.workers or config.workers.max, counted)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model {config.model.base or 'architecture'}: {reason}") from None


def _preemptions(options: argparse.Namespace) -> Any:
    from pipeline.plan import Preemptions

    return Preemptions(options.preemptions, gpus_per_machine=options.gpus_per_machine)


def _prices(options: argparse.Namespace) -> dict[str, float]:
    named = {"on_demand": options.price, "spot": options.spot_price}
    return {name: price for name, price in named.items() if price is not None}


def _number(text: str) -> Any:
    """8k → 8192; 0.1 stays text, which the config reads."""
    digits = text.lower().removesuffix("k")
    if not digits.isdigit():
        return text
    return int(digits) * (SUFFIX if digits != text.lower() else 1)
