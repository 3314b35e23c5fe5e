import json
from typing import Any

import mlflow.data
import pytest
from mlflow.entities import DatasetInput
from mlflow.types.schema import Schema

from pipeline.config import Config, parse_config
from pipeline.dataset_inputs import dataset_inputs, name_of, without_credentials


@pytest.fixture
def config() -> Config:
    return parse_config(
        {
            "run": {"name": "a"},
            "model": {"base": "m"},
            "context": {"length": 64},
            "attention": {"group_size": 16},
            "data": {"train": ["examples/books/train"], "validation": ["examples/books/heldout"]},
            "optimization": {"steps": 8, "global_batch": 2, "warmup_steps": 0},
        }
    )


def told(fingerprint: str, uri: str = "s3://bucket/longlora/packs/0a1b") -> dict[str, Any]:
    counts = {"sequences": 3, "sequence_length": 64, "tokens": 190, "target_tokens": 185, "documents": 5}
    return {"uri": uri, "fingerprint": fingerprint, **counts}


def test_packs_are_inputs_that_mlflow_understands(config: Config) -> None:
    packs = {("validation", "2c3d"): told("2c3d"), ("training", "0a1b"): told("0a1b")}
    made = dataset_inputs(config, packs)
    assert [(one.dataset.name, one.dataset.digest, one.tags[0].value) for one in made] == [
        ("books/train", "0a1b", "training"),
        ("books/heldout", "2c3d", "validation"),
    ]
    dataset = made[0].dataset
    assert mlflow.data.get_source(DatasetInput(dataset)).uri == "s3://bucket/longlora/packs/0a1b"
    profile = json.loads(dataset.profile or "")
    assert (profile["num_rows"], profile["num_elements"], profile["sequence_length"]) == (3, 190, 64)
    columns = json.loads(dataset.schema or "")["mlflow_colspec"]
    schema = Schema.from_json(json.dumps(columns))
    assert schema.input_names() == [
        *("row", "input_ids", "document_lengths", "document_ids", "target_mask", "target_tokens")
    ]
    assert [column["required"] for column in schema.to_dict()] == [True, True, True, True, False, True]


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        (["examples/books/train"], "books/train"),
        (["/data/books.jsonl.gz", "/data/more.jsonl", "/data/*.txt"], "data/books.jsonl.gz +2"),
        (["https://me@host/corpora/books.txt?signature=hunter2"], "corpora/books.txt"),
        (["s3://bucket"], "bucket"),
        (["x" * 600, "y"], "x" * 497 + " +1"),
        ([], "packs"),
    ],
)
def test_an_input_is_named_after_its_documents(entries: list[str], name: str) -> None:
    assert name_of(entries) == name


@pytest.mark.parametrize(
    ("uri", "public"),
    [
        ("s3://key:hunter2@bucket/a@b/c", "s3://bucket/a@b/c"),
        ("s3://bucket/packs?token=hunter2", "s3://bucket/packs"),
        ("/home/me@work/packs", "/home/me@work/packs"),
    ],
)
def test_a_source_carries_no_credentials(uri: str, public: str) -> None:
    assert without_credentials(uri) == public
