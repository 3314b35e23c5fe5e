"""What is wrong with a search, before anything is started."""

from typing import Any

from upath import UPath

from pipeline.config import Config, ConfigError
from pipeline.run_config import FILE, run_config
from pipeline.search_trials import trial_config

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
        condition = {other: values[0] for other, values in parameter.when.items()}
        for value in parameter.extremes():
            try:
                trial_config(config, {**condition, key: value})
            except ConfigError as error:
                raise ConfigError(f"search.space {key} = {value!r}: {error}") from None
    if (folder / FILE).exists():
        _check_same(config, run_config(folder))


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
