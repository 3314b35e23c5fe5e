from pathlib import Path

import pytest
from upath import UPath

from pipeline.config import Config, ConfigError, load_config
from pipeline.prepare import PreparedPacks
from pipeline.run_config import keep_config
from pipeline.search_check import check_search, keep_packs


def demo(*overrides: str) -> Config:
    return load_config("configs/search-demo.yaml", list(overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.space={}", "search.space is empty"),
        ("evaluation.every_steps=null", "evaluation.every_steps is null: a search compares validation losses"),
        ("search.space={adapter.rnk: {choice: [1]}}", "search.space adapter.rnk = 1: adapter.rnk: unknown key"),
        (
            "search.space={attention.group_size: {choice: [512, 513]}}",
            "search.space attention.group_size = 513: attention.group_size is 513: it must be even",
        ),
        ("search.space={adapter.rank: {uniform: [4, 64]}}", "search.space adapter.rank = 23.0"),
        ("search.space={adapter.dropout: {uniform: [0.0, 1.5]}}", "search.space adapter.dropout = 1.5: "),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, override: str, message: str) -> None:
    config = demo("search.sampler=random", override)
    with pytest.raises(ConfigError) as error:
        check_search(config, UPath(tmp_path))
    assert str(error.value).startswith(message)


def test_the_name_of_a_training_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    with pytest.raises(ConfigError, match="is a training run: give the search a name of its own"):
        check_search(demo(), UPath(tmp_path))


def test_a_search_goes_on_with_more_trials_but_not_with_another_space(tmp_path: Path) -> None:
    keep_config(demo(), UPath(tmp_path))
    check_search(demo("search.trials=99", "search.sampler=random", "search.max_hours=2"), UPath(tmp_path))
    for override in ("search.space={adapter.rank: {choice: [4]}}", "evaluation.rows=2", "search.asha=null"):
        with pytest.raises(ConfigError, match=f"begun with another {override.partition('=')[0]}"):
            check_search(demo(override), UPath(tmp_path))


@pytest.mark.parametrize("sampler", ["grid", "random"])
@pytest.mark.parametrize(
    "space",
    [
        "{adapter.dropout: {choice: [0.1]}, optimization.micro_batch: {choice: [1]}}",  # not with the config's own 2
        "{adapter.dropout: {choice: [0.0, 0.1]}, optimization.micro_batch: {choice: [2, 1]}}",  # not all beside each
        "{optimization.micro_batch: {choice: [2, 1]}, adapter.dropout: {choice: [0.1], when: "
        "{optimization.micro_batch: [1]}}}",
    ],
)
def test_a_value_that_is_legal_beside_some_others_is_legal(tmp_path: Path, sampler: str, space: str) -> None:
    config = demo("optimization.micro_batch=2", f"search.sampler={sampler}", f"search.space={space}")
    check_search(config, UPath(tmp_path))


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_a_value_that_is_illegal_beside_all_others_is_refused(tmp_path: Path, sampler: str) -> None:
    space = "search.space={adapter.dropout: {choice: [0.0, 0.1]}, optimization.micro_batch: {choice: [2]}}"
    with pytest.raises(ConfigError, match=r"^search.space adapter.dropout = 0.1: adapter.dropout 0.1 needs"):
        check_search(demo(f"search.sampler={sampler}", space), UPath(tmp_path))


def test_a_search_does_not_go_on_with_other_packs(tmp_path: Path) -> None:
    folder, packs = UPath(tmp_path) / "tried", UPath(tmp_path) / "packs"
    keep_packs(PreparedPacks(packs / "a1", packs / "b1"), folder)
    keep_packs(PreparedPacks(packs / "a1", packs / "b1"), folder)
    with pytest.raises(ConfigError) as error:
        keep_packs(PreparedPacks(packs / "a1", packs / "b2"), folder)
    assert str(error.value).startswith("search 'tried' was begun on other packs (validation b1 → b2): its trials")
    with pytest.raises(ConfigError, match="other packs"):
        keep_packs(PreparedPacks(packs / "a1", None), folder)
