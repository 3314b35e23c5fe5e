"""The config of a run, kept in its folder: by it a run is resumed with the settings that it was started with."""

import yaml
from upath import UPath

from pipeline.config import Config, ConfigError, parse_config
from pipeline.storage import write_atomic

FILE = "config.yaml"


def run_config(run_folder: UPath) -> Config:
    """The config that a run was started with; ConfigError if it has not been started."""
    path = run_folder / FILE
    if not path.exists():
        raise ConfigError(f"{run_folder}: is no run folder, it has no {FILE}")
    return parse_config(yaml.safe_load(path.read_text(encoding="utf-8")))


def keep_config(config: Config, run_folder: UPath) -> None:
    """Writes the resolved config of a run that starts training, or goes on."""
    write_atomic(run_folder / FILE, config.to_yaml().encode())


def check_unchanged(config: Config, run_folder: UPath) -> None:
    """ConfigError, naming the first one, if decisive settings differ from those that the run was started with."""
    if not (run_folder / FILE).exists():
        return
    before, now = run_config(run_folder).decisive(), config.decisive()
    allowed = set(config.run.allow_config_change)
    changed = [key for key in now if now[key] != before.get(key) and key not in allowed]
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ConfigError(
            f"{key} is {now[key]!r}, and run {config.run.name!r} was started with {before.get(key)!r}{more}: "
            f"give the run another name, or allow it with run.allow_config_change='[{key}]'"
        )
