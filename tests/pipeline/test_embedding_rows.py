"""Embeddings' gradients between workers: the rows that were touched, and the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from longlora.model import build_base, training_model
from pipeline import embedding_rows
from pipeline.config import REPOSITORY
from pipeline.embedding_rows import sparse_embedding
from pipeline.session import worker_environment

ROWS, WIDTH = 4000, 64
STEPS = 2
TOLERANCE = 1e-5  # a thousandth of an update: three workers' gradients are added in another order


def outcome(folder: Path, world_size: int, tokens: int) -> list[dict[str, float]]:
    script = str(Path(__file__).with_name("embedding_rows_rank.py"))
    environment = {**os.environ, **worker_environment(zero_stage=2), "PYTHONPATH": str(REPOSITORY)}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world_size), str(folder), str(tokens)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    told = []
    for rank in ranks:
        output, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors
        told.append(json.loads(output.splitlines()[-1]))
    return told


@pytest.mark.parametrize("world_size", [2, 3])
def test_touched_rows_give_the_same_weights_for_fewer_bytes(tmp_path: Path, world_size: int) -> None:
    """Each worker touches 100 rows a step; together at most 100 · world. A byte a row says which."""
    for told in outcome(tmp_path, world_size, tokens=100):
        assert told["difference"] <= TOLERANCE and told["moved"] > 0.1
        others = told["dense"] - STEPS * ROWS * WIDTH * 4  # what LoRA and norms send either way
        embeddings = told["touched"] - others
        assert 0 < embeddings <= STEPS * (ROWS + world_size * 100 * WIDTH * 4)


def test_where_most_rows_are_touched_all_are_sent(tmp_path: Path) -> None:
    for told in outcome(tmp_path, 2, tokens=1300):
        assert told["difference"] <= TOLERANCE
        assert told["touched"] == told["dense"] + STEPS * ROWS


@pytest.mark.parametrize(
    ("adapter", "tied", "wanted"),
    [({}, False, True), ({"train_embeddings": False}, False, False), ({}, True, False)],
    ids=["trained", "frozen", "tied"],
)
def test_which_embeddings_are_sparse(
    monkeypatch: pytest.MonkeyPatch, adapter: dict[str, object], tied: bool, wanted: bool
) -> None:
    """A tied output layer touches every row; small ones are not worth it."""
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "vocab_size": 50, "max_position_embeddings": 32, "tie_word_embeddings": tied}
    base = build_base(None, config, dtype=torch.float32, rope=None, context_length=32, init_seed=0)
    lora = {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": "auto", "rslora": False, "dora": False}
    model = training_model(base, lora | {"train_embeddings": True, "train_norms": True} | adapter)
    assert sparse_embedding(model) is None
    monkeypatch.setattr(embedding_rows, "LEAST_ELEMENTS", 50 * 16)
    found = sparse_embedding(model)
    assert (found is not None) == wanted
    if found is not None:
        assert isinstance(found, nn.Parameter) and found.shape == (50, 16) and found.requires_grad
