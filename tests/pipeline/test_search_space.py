from typing import Any

import pytest

from pipeline.config import ConfigError, load_config, parse_config
from pipeline.search_space import Parameter, Search


def search(**values: Any) -> Any:
    config = load_config("configs/search-demo.yaml").model_dump(mode="json")
    return parse_config({**config, "search": {"space": {"adapter.rank": {"choice": [4, 8]}}, **values}}).search


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"space": {"adapter.rank": {}}}, "give each key exactly one of choice, uniform and log_uniform"),
        (
            {"space": {"adapter.rank": {"choice": [4], "uniform": [1, 2]}}},
            "give each key exactly one of choice, uniform and log_uniform",
        ),
        ({"space": {"adapter.dropout": {"uniform": [0.1, 0.1]}}}, r"\[0.1, 0.1\] is no range"),
        (
            {"space": {"adapter.alpha": {"log_uniform": [0, 1]}}},
            r"\[0, 1\] is no range: give the lower end first, above",
        ),
        ({"space": {"data.train": {"choice": [["a"]]}}}, "search.space has data.train: all trials share it"),
        ({"space": {"evaluation.rows": {"choice": [2]}}}, "search.space has evaluation.rows: all trials share it"),
        (
            {"space": {"optimization.steps": {"choice": [2]}}},
            "search.space has optimization.steps: all trials share it",
        ),
        ({"space": {"context.length": {"choice": [512]}}}, "search.space has context.length: all trials share it"),
        (
            {
                "space": {
                    "adapter.alpha": {"choice": [8], "when": {"adapter.rank": [4]}},
                    "adapter.rank": {"choice": [4]},
                }
            },
            "adapter.alpha has a condition on adapter.rank: name that key above it",
        ),
        (
            {"space": {"adapter.alpha": {"uniform": [8, 16]}}, "sampler": "grid"},
            "search.sampler grid: adapter.alpha has a range",
        ),
        ({"objectives": ["eval/loss", "eval/loss"]}, "search.objectives names eval/loss twice"),
        ({"max_cost": 5}, "search.max_cost needs search.worker_hour_price"),
        ({"asha": {"reduction_factor": 1}}, "search.asha.reduction_factor = 1"),
    ],
)
def test_a_mistake_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        search(**values)
    assert "\n" not in str(error.value)


def test_a_grid_leaves_out_keys_whose_condition_does_not_hold() -> None:
    space = {
        "adapter.rank": Parameter(choice=[4, 8]),
        "adapter.dropout": Parameter(choice=[0.0, 0.1], when={"adapter.rank": [8]}),
    }
    assert Search(space=space, sampler="grid").grid() == [
        {"adapter.rank": 4},
        {"adapter.rank": 8, "adapter.dropout": 0.0},
        {"adapter.rank": 8, "adapter.dropout": 0.1},
    ]


def test_only_a_search_logs_its_section() -> None:
    config = load_config("configs/search-demo.yaml")
    assert "search.space" in config.flat()
    assert not [key for key in load_config().flat() if key.startswith("search.")]
