"""One rank of test_embedding_rows.py: `python embedding_rows_rank.py RANK WORLD_SIZE FOLDER TOKENS`.

Trains two steps twice from the same weights, with all rows of the embeddings reduced and with the touched ones, and
prints the largest difference of the weights and the bytes that each way sent, as JSON.
"""

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist

from pipeline import embedding_rows
from pipeline import engine as engine_module
from pipeline.config import parse_config
from pipeline.engine import TrainingEngine
from pipeline.feed import MicroBatch
from pipeline.models import build_model
from pipeline.optimizer import build_optimizer

embedding_rows.LEAST_ELEMENTS = 0
sent = 0


def counting(collective: Any) -> Any:
    def call(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        global sent
        sent += tensor.numel() * tensor.element_size()
        return collective(tensor, *arguments, **keywords)

    return call


def train(config: Any, rank: int, tokens: int) -> tuple[list[torch.Tensor], int]:
    """Weights after two steps, and bytes given to reductions in them."""
    global sent
    torch.manual_seed(0)
    model = build_model(config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    engine = TrainingEngine(model, build_optimizer(model, config), config)
    sent = 0
    for step in range(2):
        ids = (torch.arange(tokens) * 3 + 7 * rank + 100 * step) % 4000
        batch = MicroBatch(
            input_ids=ids[None],
            position_ids=torch.arange(tokens)[None],
            targets=ids.roll(-1),
            document_lengths=(tokens,),
            rows=(tokens,),
            sequences=(step,),
            positions=(step,),
            target_tokens=tokens,
        )
        engine.accumulate([batch], None, tokens * dist.get_world_size())
        engine.apply(1e-2)
    trained = [parameter.detach().clone() for _, parameter in engine.named_trainable()]
    return trained, sent


def main() -> None:
    rank, world_size, folder, tokens = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    for name in ("all_reduce", "reduce"):
        setattr(dist, name, counting(getattr(dist, name)))
    architecture = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    architecture |= {"num_attention_heads": 4, "vocab_size": 4000, "max_position_embeddings": 2048}
    config = parse_config(
        {
            "run": {"name": "rows"},
            "model": {"architecture": architecture, "tokenizer": "none", "dtype": "float32", "activations": "keep"},
            "context": {"length": 2048},
            "attention": {"group_size": None},
            "data": {"train": ["none"]},
            "optimization": {"steps": 2, "global_batch": world_size, "warmup_steps": 0},
            "evaluation": {"lengths": [512]},
        }
    )
    touched, bytes_of_touched = train(config, rank, tokens)
    engine_module.sparse_embedding = lambda model: None
    dense, bytes_of_dense = train(config, rank, tokens)
    difference = max(float((x - y).abs().max()) for x, y in zip(touched, dense, strict=True))
    moved = max(float(x.abs().max()) for x in touched)
    print(json.dumps({"difference": difference, "moved": moved, "touched": bytes_of_touched, "dense": bytes_of_dense}))


main()
