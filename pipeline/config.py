"""The typed configuration: one value, one name, one owner.

A run is described by one YAML file plus `section.key=value` overrides. Everything is checked here, before torch or Ray
is imported; what the resolved file says is what is saved with the run, logged to MLflow and read back on resume.
"""

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ValidationError, model_validator

from pipeline.search_space import Search
from pipeline.section import Section
from pipeline.sections import (
    Adapter,
    Attention,
    Checkpoint,
    Context,
    Data,
    Evaluation,
    Model,
    Optimization,
    Run,
    Tracking,
    Workers,
)

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = REPOSITORY / "configs" / "quickstart.yaml"


class ConfigError(ValueError):
    """A user's mistake: its message is one line that names the key, the value and what would be legal."""


class Config(Section):
    """All sections; a YAML file gives those that differ from the defaults."""

    run: Run
    model: Model
    context: Context
    attention: Attention
    adapter: Adapter = Adapter()
    data: Data
    optimization: Optimization
    workers: Workers = Workers()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    search: Search = Search()

    @model_validator(mode="after")
    def no_secrets(self) -> Self:
        """What a config says is saved with the run and shown in MLflow."""
        for key, value in self.flat().items():
            if SECRET.search(str(value)):
                raise ValueError(
                    f"{key} has credentials in a URI: put them into the environment (AWS_ACCESS_KEY_ID, …)"
                )
        return self

    @model_validator(mode="after")
    def sections_agree(self) -> Self:
        if self.evaluation.every_steps is not None and not self.data.validation:
            raise ValueError(
                "evaluation.every_steps needs data.validation: name the held-out documents, or set it to null"
            )
        if self.adapter.dropout and self.optimization.micro_batch > 1:
            raise ValueError(
                f"adapter.dropout {self.adapter.dropout} needs optimization.micro_batch 1: rows of one micro-batch "
                "would drop out differently at another number of workers"
            )
        too_long = [n for n in self.evaluation.lengths if n > self.context.length]
        if too_long:
            raise ValueError(f"evaluation.lengths has {too_long[0]}: at most context.length ({self.context.length})")
        return self

    def flat(self) -> dict[str, Any]:
        """Dotted keys and JSON values, in the order of the file: what MLflow gets as params."""
        sections = self.model_dump(mode="json", exclude=None if self.search.space else {"search"})
        return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the result of a training step, by dotted key: a run is resumed with the same.

        Left out is what depends on the machine: paths (fingerprints say what they lead to), and what its memory holds.
        """
        return {
            key: value
            for key, value in self.flat().items()
            if (key.split(".")[0] in DECISIVE_SECTIONS or key == "run.seed") and key not in PATHS | MACHINE
        }

    def training_hash(self) -> str:
        """Hash of the decisive settings."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


SECRET = re.compile(
    r"://[^/@\s]*:(?!\d+/)[^@\s]*@"  # s3://key:secret@bucket; a secret may hold slashes
    r"|https?://[^/@\s]+@"  # https://token@host
    r"|://\S*[?&][\w-]*(signature|\bsig|token|secret|password|credential)=",  # of a signed URL
    re.IGNORECASE,
)
DECISIVE_SECTIONS = {"model", "context", "attention", "adapter", "optimization"}
PATHS = {"model.base", "model.tokenizer"}  # fingerprints say what they lead to
MACHINE = {"model.activations", "model.fused"}  # how a machine computes, not what


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """The config of a YAML file with `section.key=value` overrides applied, checked.

    Raises ConfigError, one line, for a missing file, broken YAML, an unknown key or an illegal value.
    """
    values = _read_yaml(Path(path) if path is not None else DEFAULT_CONFIG)
    for override in overrides or []:
        _apply(values, override)
    return parse_config(values)


def local_path(text: str) -> str:
    """A path of a config, made absolute: paths that are not absolute are relative to the repository.

    What does not exist there is returned as it is (a hub name, a URI, or a mistake that its reader reports).
    """
    beside = REPOSITORY / text
    return str(beside) if "://" not in text and (beside.exists() or any(c in text for c in "*?[")) else text


def parse_config(values: dict[str, Any]) -> Config:
    """The checked config of nested values (see `load_config`)."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, for editors (`configs/schema.json`)."""
    return Config.model_json_schema()


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; give a YAML file, e.g. {DEFAULT_CONFIG.name}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"--config {path}: expected sections such as `run:` and `model:`, found {type(values).__name__}"
        )
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name):
        raise ConfigError(f"{override!r}: overrides have the form section.key=value, e.g. run.name=my-run")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: {text!r} is not a valid YAML value") from None
    target, *path, last = values, section, *name.split(".")
    for part in path:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise ConfigError(f"{key}: {part} is a value, and has no settings of its own")
    target[last] = value


def _known_keys() -> list[str]:
    keys = []
    for section, field in Config.model_fields.items():
        fields = field.annotation.model_fields if field.annotation in Section.__subclasses__() else {}
        keys += [section, *(f"{section}.{key}" for key in fields)]
    return keys


def _one_line(error: ValidationError) -> str:
    """The first of pydantic's findings as `key = value: what would be legal`, and how many follow it."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in _known_parts())
    if first["type"] == "extra_forbidden":
        key = ".".join(map(str, first["loc"]))
        near = difflib.get_close_matches(key, _known_keys(), n=1, cutoff=0.5)
        text = f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    elif first["type"] == "missing":
        text = f"{key} is missing: it has no default"
    elif first["type"] == "value_error":
        text = str(first["ctx"]["error"])
    else:
        text = f"{key} = {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    more = len({e["loc"][:2] for e in error.errors()}) - 1
    return text + (f" (and {more} more)" if more else "")


def _known_parts() -> set[str]:
    nested = {name for section in Section.__subclasses__() for name in section.model_fields}
    return {part for key in _known_keys() for part in key.split(".")} | nested
