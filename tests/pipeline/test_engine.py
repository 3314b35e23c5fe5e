"""Host memory of a start under ZeRO-3, in two processes of their own. What the engine computes: tests/integration."""

import os
import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import REPOSITORY
from pipeline.session import worker_environment

WORLD_SIZE = 2
FIXED_BYTES = 32 * 2**20  # what a start takes whatever the size of the base: 11 MB measured with a base of 2 MB


def test_under_zero3_each_rank_loads_its_share(tmp_path: Path) -> None:
    """At most 1.3 × base ÷ world, and the embeddings twice: gathered, and the trainable copy that PEFT makes."""
    shapes = LlamaConfig(
        vocab_size=4000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    base = LlamaForCausalLM(shapes)
    base_bytes = sum(parameter.nbytes for parameter in base.parameters())
    embedding_bytes = base.get_input_embeddings().weight.nbytes
    base.save_pretrained(tmp_path)
    del base
    script = str(Path(__file__).with_name("zero3_rank.py"))
    environment = {**os.environ, **worker_environment(zero_stage=3), "PYTHONPATH": str(REPOSITORY)}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(WORLD_SIZE), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    for rank in ranks:
        output, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors
        taken = int(output.split()[-1])
        assert base_bytes / WORLD_SIZE < taken <= 1.3 * base_bytes / WORLD_SIZE + 2 * embedding_bytes + FIXED_BYTES
