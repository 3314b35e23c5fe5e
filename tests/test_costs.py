"""The costs in the guide to clusters are what `plan` computes from the recipes."""

import re
from collections import defaultdict
from collections.abc import Iterator

import pytest

from pipeline.config import REPOSITORY, load_config
from pipeline.gpus import GPUS
from pipeline.plan import Preemptions, make_plan
from pipeline.plan_report import plan_json
from tests.test_configs import SHAPES

PRICES = {"a100-80g": {"on_demand": 2.5, "spot": 1.25}, "h100": {"on_demand": 4.0, "spot": 2.0}}
COUNTED: dict[str, dict[str, object]] = defaultdict(dict)  # on a recipe's model, the same for any GPU
NAMES = {"8 × A100 80 GB": "a100-80g", "8 × H100": "h100"}


def rows() -> Iterator[tuple[str, str, list[float]]]:
    """(recipe, GPU, [tokens/s, hours, on demand, spot]) of the guide's table."""
    recipe = ""
    for line in (REPOSITORY / "cluster" / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 6 and cells[1] in NAMES:
            named = re.match(r"`([\w-]+)`", cells[0])
            recipe = named[1] if named else recipe
            yield recipe, NAMES[cells[1]], [float(cell.replace(",", "")) for cell in cells[2:]]


@pytest.mark.parametrize(("recipe", "gpu", "told"), [pytest.param(*row, id="-".join(row[:2])) for row in rows()])
def test_a_row_of_the_cost_table(recipe: str, gpu: str, told: list[float]) -> None:
    config = load_config(REPOSITORY / "configs" / f"{recipe}.yaml")
    shapes = {"base": None, "architecture": SHAPES[str(config.model.base)], "tokenizer": "nowhere"}
    config = config.model_copy(update={"model": config.model.model_copy(update=shapes)})
    preemptions = Preemptions(0.05, gpus_per_machine=8)
    planned = plan_json(make_plan(config, GPUS[gpu], 8, COUNTED[recipe]), PRICES[gpu], preemptions)
    costs = planned["cost"]
    found = [planned["tokens_per_second"], planned["hours"], costs["on_demand"], costs["spot"]]
    assert told == pytest.approx(found, rel=0.005)


def test_the_table_is_there() -> None:
    assert len(list(rows())) == 7
