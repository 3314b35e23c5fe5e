"""A finished little run, made on the fly: random base, adapter checkpoint, documents, tokenizer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from upath import UPath

from longlora.adapters import attach_adapter, enable_full_training
from longlora.model import build_base
from pipeline import checkpoints
from pipeline.checkpoints import RunState
from pipeline.config import Config, parse_config
from pipeline.optimizer import ParameterState
from pipeline.storage import write_atomic

NATIVE, EXTENDED = 256, 512
WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "rain",
    "fell",
    "over",
    "quiet",
    "hills",
    "and",
    "old",
    "ships",
)

MakeRun = Callable[..., tuple[Config, UPath]]


def _save_tokenizer(folder: Path) -> None:
    """Single bytes as tokens, with begin and end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=NATIVE)
    fast.save_pretrained(folder)


def _text(words: int, seed: int) -> str:
    chosen = torch.randint(0, len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[n] for n in chosen)


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow, to copy: making one takes seconds, and so does the import that it brings."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with a context of 256 tokens, and its byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=NATIVE,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,  # far from uniform predictions, so that models and lengths differ
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


@pytest.fixture
def make_run(tmp_path: Path, tiny_base: Path) -> MakeRun:
    """make_run(kind="lora", **sections) → config and run folder with one checkpoint of random trained weights."""

    def make(kind: str = "lora", storage: str | None = None, **sections: dict[str, object]) -> tuple[Config, UPath]:
        held_out = tmp_path / "held-out"
        held_out.mkdir(exist_ok=True)
        for n, words in enumerate((500, 300, 20)):  # about 2300, 1400 and 90 tokens
            (held_out / f"book-{n}.txt").write_text(_text(words, n))
        values: dict[str, dict[str, object]] = {
            "run": {"name": "tiny", "storage": storage or str(tmp_path / "runs")},
            "model": {"base": str(tiny_base), "dtype": "float32", "activations": "keep"},
            "context": {"length": EXTENDED},
            "attention": {"group_size": 128},
            "adapter": {"kind": kind},
            "data": {"train": [str(held_out)], "validation": [str(held_out)]},
            "optimization": {"steps": 30, "global_batch": 2, "warmup_steps": 2},
            "evaluation": {"tokens": 2048, "context_blocks": 6},
        }
        config = parse_config({name: value | sections.get(name, {}) for name, value in values.items()})
        run_folder = UPath(config.run.storage) / config.run.name
        write_atomic(run_folder / "config.yaml", config.to_yaml().encode())
        save_checkpoint(config, run_folder, step=10)
        return config, run_folder

    return make


def save_checkpoint(config: Config, run_folder: UPath, step: int) -> UPath:
    """Commits a checkpoint whose trained weights are the base's plus noise that depends on the step."""
    base = build_base(
        config.model.base,
        config.model.architecture,
        dtype=torch.float32,
        rope=config.context.rope,
        context_length=config.context.length,
        init_seed=config.run.seed,
    )
    settings = config.adapter.model_dump(exclude={"kind", "lora_b_lr_ratio"})
    torch.manual_seed(step)  # LoRA's A matrices are drawn from it; unlucky ones hardly change the model's perplexity
    network = attach_adapter(base, **settings) if config.adapter.kind == "lora" else enable_full_training(base)
    generator = torch.Generator().manual_seed(step)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    states = {
        name: ParameterState(parameter.data, torch.zeros_like(parameter), torch.zeros_like(parameter))
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }
    fingerprint = checkpoints.base_fingerprint(config.model.base) if config.model.base else "random"
    state = RunState(step, 2 * step, "packs", fingerprint, "training", attempt=1, eval_loss=None)
    return checkpoints.save(run_folder, state, network, states)


@pytest.fixture
def commit_checkpoint() -> Callable[..., UPath]:
    return save_checkpoint
