"""A run's packs as MLflow's dataset inputs: what its pages show and compare runs by. Imports MLflow, seconds."""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from pipeline.config import Config
from pipeline.packs import SCHEMA

NAME_LIMIT = 500  # characters
TYPES = {pa.int32(): "integer", pa.string(): "string", pa.bool_(): "boolean"}
"""MLflow's names of the types in packs."""


def dataset_inputs(config: Config, packs: Mapping[tuple[str, str], dict[str, Any]]) -> list[DatasetInput]:
    """One for each of the packs, which are given by use (training or validation) and fingerprint; training's first.

    Packs that serve both uses are one data set to MLflow, and it shows the first.
    """
    entries = {"training": config.data.train, "validation": config.data.validation}
    return [
        DatasetInput(_dataset(name_of(entries[use]), told), [InputTag(MLFLOW_DATASET_CONTEXT, use)])
        for (use, _), told in sorted(packs.items())
    ]


def name_of(entries: list[str]) -> str:
    """`books/train`, or `books/train +2` for three entries: the end of the first one's path, without its query."""
    if not entries:
        return "packs"
    path = without_credentials(entries[0]).rpartition("://")[2].rstrip("/")
    more = f" +{len(entries) - 1}" if len(entries) > 1 else ""
    return "/".join(path.split("/")[-2:])[: NAME_LIMIT - len(more)] + more


def _dataset(name: str, told: dict[str, Any]) -> Dataset:
    uri = without_credentials(told["uri"])
    profile = {
        "num_rows": told["sequences"],  # these two are what MLflow's pages show
        "num_elements": told["tokens"],
        **{key: told[key] for key in ("sequence_length", "tokens", "target_tokens", "documents")},
    }
    return Dataset(
        name=name,
        digest=told["fingerprint"],
        source_type=uri.partition("://")[0] if "://" in uri else "local",
        source=json.dumps({"uri": uri}),
        schema=json.dumps({"mlflow_colspec": [_column(field) for field in SCHEMA]}),
        profile=json.dumps(profile),
    )


def without_credentials(uri: str) -> str:
    """The URI without a user, password or query, which may hold a signature."""
    scheme, separator, rest = uri.partition("://")
    host, slash, path = rest.split("?")[0].partition("/")
    return scheme + separator + host.rpartition("@")[2] + slash + path


def _column(field: pa.Field) -> dict[str, Any]:
    if pa.types.is_list(field.type):
        items = {"type": TYPES[field.type.value_type]}
        return {"type": "array", "items": items, "name": field.name, "required": field.name != "target_mask"}
    return {"type": TYPES[field.type], "name": field.name, "required": True}
