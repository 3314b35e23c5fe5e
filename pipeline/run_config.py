"""The config of a run, kept in its folder: by it a run is resumed with the settings that it was started with."""

from typing import Any

import yaml
from upath import UPath

from pipeline.config import Config, ConfigError, parse_config
from pipeline.storage import write_atomic

FILE = "config.yaml"
SHOWN = 12  # differences that an error names at most
LONG = 40  # characters of a value


def run_config(run_folder: UPath) -> Config:
    """The config that a run was started with; ConfigError if there is none, or one of a version with other settings."""
    path = run_folder / FILE
    if not path.exists():
        raise ConfigError(f"{run_folder}: is no run folder, it has no {FILE}")
    try:
        return parse_config(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ConfigError as error:
        raise ConfigError(
            f"{path} was written by another version ({error}): give the run another name, or go on with that version"
        ) from None


def keep_config(config: Config, run_folder: UPath) -> None:
    """Writes the resolved config of a run that starts training, or goes on."""
    write_atomic(run_folder / FILE, config.to_yaml().encode())


def check_unchanged(config: Config, run_folder: UPath) -> None:
    """ConfigError with the difference, if decisive settings are not those that the run was started with."""
    if not (run_folder / FILE).exists():
        return
    before, now = run_config(run_folder).decisive(), config.decisive()
    allowed = set(config.run.allow_config_change)
    changed = [key for key in now if now[key] != before.get(key) and key not in allowed]
    if changed:
        differences = [text for key in changed for text in _differences(key, before.get(key), now[key])]
        more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise ConfigError(
            f"run {config.run.name!r} was started with other settings: {', '.join(differences[:SHOWN])}{more}; "
            f"give the run another name, or allow what changed with run.allow_config_change='[{', '.join(changed)}]'"
        )


def _differences(key: str, before: Any, now: Any) -> list[str]:
    """`key: old → new`, of a mapping for each of its own keys that differ; long values are cut."""
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [text for name in keys for text in _differences(f"{key}.{name}", before.get(name), now.get(name))]
    old, new = (text if len(text) <= LONG else f"{text[:LONG]}…" for text in (repr(before), repr(now)))
    return [f"{key}: {old} → {new}"]
