"""The models of a run: the one that trains, and plain transformers models with dense attention.

The latter are what is evaluated, exported and generated from.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from upath import UPath

from longlora.merge import merged_model
from longlora.model import LongContextModel, build_base, training_model
from pipeline import checkpoints
from pipeline.config import Config, ConfigError, local_path
from pipeline.storage import is_local


def newest_checkpoint(run_folder: UPath) -> UPath:
    """The newest checkpoint that verifies; ConfigError if there is none."""
    folder = checkpoints.newest(run_folder)
    if folder is None:
        raise ConfigError(f"{run_folder}: has no checkpoint; train first")
    return folder


def placed(model: PreTrainedModel) -> PreTrainedModel:
    """`model` on the GPU, if there is one."""
    return nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")


def published_config(config: Config) -> PreTrainedConfig:
    """The transformers config of `model.base` as published."""
    return AutoConfig.from_pretrained(
        local_path(config.model.base or ""), revision=config.model.revision, trust_remote_code=False
    )


def native_length(config: Config) -> int:
    """The context of `model.base`, in tokens; `context.length` for a random model, which has no other."""
    if config.model.base is None:
        return config.context.length
    return config.context.native_length or published_config(config).max_position_embeddings


def build_model(config: Config, device: Literal["cpu", "meta"] = "cpu", *, fuse: bool = False) -> LongContextModel:
    """The model that trains: base → RoPE → S²-Attn → adapters, as the config says. On "meta" shapes only.

    `fuse` puts fused operators in, which run on a GPU.
    """
    adapter = config.adapter
    base = _built(
        config,
        config.context.rope,
        config.context.length,
        config.model.sliding_window,
        attention="s2",
        device=device,
        fuse=fuse,
    )
    settings = adapter.model_dump(exclude={"kind", "lora_b_lr_ratio"})
    return training_model(base, settings if adapter.kind == "lora" else None, config.attention.backend, fuse)


def scaling_note(config: Config) -> str:
    """A line about a base whose config leaves open how far it reads; empty for any other.

    Models with linear scaling are published with the length before it (Vicuna 16k) and with the length after it.
    """
    if config.model.base is None or config.context.native_length is not None:
        return ""
    published = published_config(config)
    rope, length = published.rope_parameters, published.max_position_embeddings
    if rope["rope_type"] != "linear":
        return ""
    return (
        f"model: its positions are scaled by {rope['factor']:g}, and it is taken to read {length:,} tokens; if that is "
        f"the length before scaling, set context.native_length={length * rope['factor']:.0f}"
    )


def base_model(config: Config) -> PreTrainedModel:
    """`model.base` as published, in `model.dtype`."""
    return _built(config, None, native_length(config), "model")


def extended_base(config: Config) -> PreTrainedModel:
    """The untrained model with its context extended to `context.length`: the base, or a random one (`architecture`)."""
    return _built(config, config.context.rope, config.context.length, config.model.sliding_window)


def trained_model(config: Config, checkpoint: UPath) -> PreTrainedModel:
    """The model of a checkpoint in `model.dtype`: adapters merged into the base, or all weights (`adapter.kind: full`).

    ConfigError if the base is not the one that was trained.
    """
    if config.model.base is not None:
        _check_base(config.model.base, checkpoint)
    with local_weights(checkpoint) as folder:
        if (folder / "adapter_config.json").exists():
            return merged_model(extended_base(config), folder)
        dtype = getattr(torch, config.model.dtype)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False)


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    source = config.model.tokenizer_source
    revision = config.model.revision if source == config.model.base else None
    return AutoTokenizer.from_pretrained(local_path(source), revision=revision, trust_remote_code=False)


@contextmanager
def local_weights(checkpoint: UPath) -> Iterator[Path]:
    """A local folder with the checkpoint's config and weights: the checkpoint itself, or a temporary copy of them."""
    if is_local(checkpoint):
        yield Path(str(checkpoint))
        return
    with tempfile.TemporaryDirectory(prefix="longlora-") as folder:
        for path in checkpoint.iterdir():
            if path.name.endswith((".json", ".safetensors")) and not path.name.startswith("optimizer-"):
                path.fs.get(path.path, str(Path(folder) / path.name))
        yield Path(folder)


def _built(
    config: Config,
    rope: str | None,
    length: int,
    sliding_window: Literal["model"] | None,
    *,
    attention: Literal["s2", "sdpa"] = "sdpa",
    fuse: bool = False,
    device: Literal["cpu", "meta"] = "cpu",
) -> PreTrainedModel:
    model = config.model
    return build_base(
        local_path(model.base) if model.base else None,
        model.architecture,
        dtype=getattr(torch, model.dtype),
        rope=rope,
        context_length=length,
        native_length=config.context.native_length,
        sliding_window=sliding_window,
        init_seed=config.run.seed,
        attention=attention,
        device=device,
        fuse=fuse,
        revision=model.revision,
    )


def _check_base(base: str, checkpoint: UPath) -> None:
    then, now = checkpoints.read_state(checkpoint).base_fingerprint, checkpoints.base_fingerprint(local_path(base))
    if now != then:
        raise ConfigError(
            f"model.base = {base!r}: its weights differ from those that {checkpoint} was trained on "
            f"({then} then, {now} now)"
        )
