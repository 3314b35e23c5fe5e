"""What is wrong with a search, before anything is started."""

from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING, Any

from upath import UPath

from pipeline.config import Config, ConfigError
from pipeline.run_config import FILE, run_config
from pipeline.search_space import Search, Settings
from pipeline.search_trials import trial_config
from pipeline.storage import read_json, write_json

if TYPE_CHECKING:  # brings in pyarrow; a mistake is to be found before that
    from pipeline.prepare import PreparedPacks

PACKS = "packs.json"
DRAWS = 200
"""Combinations of a value with others that are looked at before it counts as illegal."""

DECISIVE = ("search.space", "search.objectives", "search.asha", "evaluation.every_steps", "evaluation.rows")
"""Settings by which trials are chosen and compared; a search goes on with the same. Budget and sampler may change."""


def check_search(config: Config, folder: UPath) -> None:
    """ConfigError, one line, if the search cannot be made, or is not the one that was begun under this name."""
    if not config.search.space:
        raise ConfigError("search.space is empty: give config keys and values to try, e.g. configs/search-demo.yaml")
    if config.evaluation.every_steps is None:
        raise ConfigError(
            "evaluation.every_steps is null: a search compares validation losses; say after how many steps"
        )
    if (folder / "ledger").exists():
        raise ConfigError(f"run.name = {config.run.name!r} is a training run: give the search a name of its own")
    for key, parameter in config.search.space.items():
        for value in parameter.extremes():
            _check_value(config, key, value)
    if (folder / FILE).exists():
        _check_same(config, run_config(folder))


def keep_packs(packs: "PreparedPacks", folder: UPath) -> None:
    """Writes down which packs the trials train on; ConfigError if earlier ones had others."""
    path = folder / PACKS
    now = {"train": packs.train.name, "validation": packs.validation.name if packs.validation else None}
    before = read_json(path) if path.exists() else now
    if before != now:
        changes = ", ".join(f"{use} {before[use]} → {now[use]}" for use in now if before[use] != now[use])
        raise ConfigError(
            f"search {folder.name!r} was begun on other packs ({changes}): its trials would not compare; "
            "bring the documents back, or give the search another name"
        )
    write_json(path, now)


def _check_value(config: Config, key: str, value: Any) -> None:
    """ConfigError if a value is illegal in whatever combination; a single trial that is illegal fails alone."""
    first: ConfigError | None = None
    for settings in _combinations(config.search, key, value):
        try:
            trial_config(config, settings)
            return
        except ConfigError as error:
            first = first or error
    if first is not None:
        raise ConfigError(f"search.space {key} = {value!r}: {first}") from None


def _combinations(search: Search, key: str, value: Any) -> Iterator[Settings]:
    """Settings with this value: all of a grid; otherwise with the first values of the other keys, then with any."""
    if search.sampler == "grid":
        yield from (point for point in search.grid() if key in point and point[key] == value)
        return
    condition = search.space[key].when
    chance = Random(0)
    for draw in range(DRAWS):
        settings: Settings = {}
        for other, parameter in search.space.items():
            values = [value] if other == key else condition.get(other) or parameter.extremes()
            if other == key or parameter.applies(settings):
                settings[other] = chance.choice(values) if draw else values[0]
        yield settings


def _check_same(config: Config, before: Config) -> None:
    old, new = (_decisive(one) for one in (before, config))
    for key in DECISIVE:
        if old[key] != new[key]:
            raise ConfigError(
                f"search {config.run.name!r} was begun with another {key}: its trials would not compare; "
                "give the search another name"
            )


def _decisive(config: Config) -> dict[str, Any]:
    values = config.flat()
    return {key: values[key] for key in DECISIVE}
