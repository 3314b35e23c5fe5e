import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel
from upath import UPath

from pipeline import models
from pipeline.config import Config, ConfigError
from pipeline.export import export
from pipeline.generate import generate

MakeRun = Callable[..., tuple[Config, UPath]]
PROMPT = "the cat sat on"


def greedy(model: PreTrainedModel, tokenizer_folder: Path, tokens: int) -> str:
    """The likeliest continuation, recomputed from the whole text for each token."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.inference_mode():
        for _ in range(tokens):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_base_continues_greedily(tiny_base: Path) -> None:
    expected = greedy(LlamaForCausalLM.from_pretrained(tiny_base), tiny_base, 12)
    pieces = list(generate(str(tiny_base), PROMPT, max_new_tokens=12, temperature=0, seed=0))
    assert "".join(pieces) == expected
    assert expected


def test_run_checkpoint_adapter_and_export_continue_alike(make_run: MakeRun, tiny_base: Path, tmp_path: Path) -> None:
    config, run_folder = make_run()
    checkpoint = models.newest_checkpoint(run_folder)
    expected = greedy(models.trained_model(config, checkpoint), tiny_base, 12)
    assert expected != greedy(LlamaForCausalLM.from_pretrained(tiny_base), tiny_base, 12)
    moved = tmp_path / "adapter"
    shutil.copytree(str(checkpoint), moved)
    for model in (run_folder, checkpoint, moved, export(config, run_folder)):
        assert "".join(generate(str(model), PROMPT, 12, temperature=0, seed=0)) == expected


def test_sampling_repeats_with_the_seed(tiny_base: Path) -> None:
    first, again, other = ("".join(generate(str(tiny_base), PROMPT, 20, 1.0, seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_refuses_more_tokens_than_the_context(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match=r"--max-new-tokens 250: with the prompt's 15 tokens .* context of 256"):
        list(generate(str(tiny_base), PROMPT, 250, 0, 0))


def test_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        list(generate(str(tmp_path), PROMPT, 1, 0, 0))


def test_an_error_while_generating_reaches_the_caller(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(LlamaForCausalLM, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(generate(str(tiny_base), PROMPT, 1, 0, 0))
