"""Text from a model: a Hugging Face folder or hub name, an adapter, a checkpoint of a run, or a run."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
)
from upath import UPath

from longlora.merge import merged_model
from pipeline import models
from pipeline.config import ConfigError
from pipeline.run_config import run_config

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def generate(model: str, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> Iterator[str]:
    """The continuation of `prompt`, piece by piece as it is made.

    model: Hugging Face folder or hub name; folder of a PEFT adapter; folder of a run (its newest checkpoint), or of one
    of its checkpoints. temperature 0 takes the likeliest token each time; above, tokens are drawn, the same ones for
    the same seed. Raises ConfigError if the model cannot be loaded, or prompt and continuation exceed its context.
    """
    network, tokenizer = load(model)
    inputs = tokenizer(prompt, return_tensors="pt")["input_ids"].to(network.device)
    length, context = inputs.shape[1], network.config.max_position_embeddings
    if length == 0:
        raise ConfigError("--prompt is empty: give at least one token to continue")
    if length + max_new_tokens > context:
        raise ConfigError(
            f"--max-new-tokens {max_new_tokens}: with the prompt's {length} tokens that exceeds the model's context of "
            f"{context}"
        )
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def continue_prompt() -> None:
        try:
            cast(Any, network).generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                **sampling,
            )
        finally:
            streamer.end()  # lets the reader below go on to the error

    with ThreadPoolExecutor(max_workers=1) as thread:
        done = thread.submit(continue_prompt)
        yield from streamer
        done.result()


def load(model: str) -> Loaded:
    """Model (dense attention, on the GPU if there is one) and tokenizer of what `generate` takes as `model`."""
    folder = UPath(model)
    try:
        if (folder / "checkpoints").exists():
            network, tokenizer = _from_run(folder, models.newest_checkpoint(folder))
        elif folder.parent.name == "checkpoints":
            network, tokenizer = _from_run(folder.parent.parent, folder)
        elif (folder / "adapter_config.json").exists():
            network, tokenizer = _from_adapter(Path(model))
        else:
            network = AutoModelForCausalLM.from_pretrained(
                model, dtype="auto", use_safetensors=True, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--model {model}: cannot be loaded ({str(error).strip().splitlines()[0]})") from None
    return models.placed(network), tokenizer


def _from_run(run: UPath, checkpoint: UPath) -> Loaded:
    config = run_config(run)
    return models.trained_model(config, checkpoint), models.tokenizer_of(config)


def _from_adapter(folder: Path) -> Loaded:
    """An adapter that left its run: its own config says which base it belongs to."""
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    return merged_model(base, folder), AutoTokenizer.from_pretrained(base, trust_remote_code=False)
