"""Every recipe of configs/ loads, says what each of its keys is for, and builds on the meta device."""

import json
import re
from pathlib import Path

import pytest
import yaml

from longlora.adapters import trainable_report
from pipeline.config import Config, json_schema, load_config
from pipeline.models import build_model

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))

LLAMA2 = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
# Shapes as their publishers give them; the weights are not needed, and the hub is not asked.
SHAPES = {
    "meta-llama/Llama-2-7b-hf": LLAMA2
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "meta-llama/Llama-2-70b-hf": LLAMA2
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8},
    "meta-llama/Meta-Llama-3-8B": {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192}
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "examples/tiny-llama": load_config(CONFIGS / "tiny-llama-pretrain.yaml").model.architecture,
}
# Trained weights and all weights, counted by hand: LoRA has r (d_in + d_out) on each of q, k, v and o, embeddings V·h,
# norms (2·layers + 1)·h.
TINY = 2048 * 256 + 4 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 512) + 9 * 256
WEIGHTS = {
    "llama2-7b-32k-8xa100": (8 * 4 * 8192 * 32 + 32000 * 4096 + 65 * 4096, 6_738_415_616),
    "llama2-7b-100k-8xa100": (8 * 4 * 8192 * 32 + 32000 * 4096 + 65 * 4096, 6_738_415_616),
    "llama3-8b-64k-8xh100": (8 * (2 * 8192 + 2 * 5120) * 32 + 128256 * 4096 + 65 * 4096, 8_030_261_248),
    "llama2-70b-32k-8xa100": (8 * (2 * 16384 + 2 * 9216) * 80 + 32000 * 8192 + 161 * 8192, 68_976_648_192),
    "quickstart": (8 * (2 * 512 + 2 * 384) * 4 + 2048 * 256 + 9 * 256, TINY),
    "tiny-llama-pretrain": (TINY, TINY),
    "search-llama2-7b-32k": (8 * 4 * 8192 * 32 + 32000 * 4096 + 65 * 4096, 6_738_415_616),
    "search-demo": (8 * (2 * 512 + 2 * 384) * 4 + 2048 * 256 + 9 * 256, TINY),
}


def recipe_id(path: Path) -> str:
    return path.stem


@pytest.fixture(params=RECIPES, ids=recipe_id)
def recipe(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_loads_as_it_says(recipe: Path) -> None:
    config = load_config(recipe)
    assert recipe.stem.startswith(
        config.run.name
    )  # <model>-<context>-<hardware>.yaml; the run needs no hardware in its name


def test_is_complete_on_its_own(recipe: Path) -> None:
    """Saved with a run, loaded again: nothing of a recipe is lost on the way."""
    config = load_config(recipe)
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_names_the_schema_for_editors(recipe: Path) -> None:
    assert recipe.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n")


def test_every_key_says_why(recipe: Path) -> None:
    silent = [
        line
        for line in recipe.read_text(encoding="utf-8").splitlines()
        if re.match(r" +[\w.]+:", line) and not re.search(r"  # \S", line)
    ]
    assert not silent


def test_follows_the_papers_ratio(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.attention.group_size in (None, config.context.length // 4)


def test_paper_recipe() -> None:
    """LongLoRA, section 4.1: 1000 steps of 64 sequences, AdamW 0.9 and 0.95, 2e-5 and for 70B 1e-5, no weight decay."""
    for path in CONFIGS.glob("llama*.yaml"):
        settings = load_config(path).optimization
        assert (settings.steps, settings.global_batch, settings.betas) == (1000, 64, (0.9, 0.95))
        assert (settings.schedule, settings.warmup_steps, settings.weight_decay) == ("constant", 20, 0.0)
        assert settings.learning_rate == (1e-5 if "70b" in path.name else 2e-5)


def test_every_recipe_has_its_weights_counted() -> None:
    assert {path.stem for path in RECIPES} == WEIGHTS.keys()


def test_builds_on_the_meta_device(recipe: Path) -> None:
    config = load_config(recipe)
    shapes = config.model.architecture or SHAPES[config.model.base or ""]
    random = config.model.model_copy(update={"base": None, "architecture": shapes})
    model = build_model(config.model_copy(update={"model": random}), device="meta")
    report = trainable_report(model)
    assert model.network.config.max_position_embeddings == config.context.length
    added = report.trainable if config.adapter.kind == "lora" else 0  # to the base: LoRA, and copies of what trains
    assert (report.trainable, report.total - added) == WEIGHTS[recipe.stem]
    assert all(parameter.is_meta for parameter in model.parameters())


def test_schema_is_current() -> None:
    """`make schema` writes it."""
    assert json.loads((CONFIGS / "schema.json").read_text(encoding="utf-8")) == json_schema()
