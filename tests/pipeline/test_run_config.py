"""A run is resumed with the settings that it was started with, wherever its storage is now."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from upath import UPath

from pipeline import checkpoints
from pipeline.config import Config, ConfigError
from pipeline.run_config import check_unchanged, keep_config, run_config


def changed(config: Config, **sections: dict[str, object]) -> Config:
    values = config.model_dump()
    return Config.model_validate({**values, **{name: {**values[name], **new} for name, new in sections.items()}})


def test_the_whole_difference_is_named(make_run: Callable) -> None:
    config, folder = make_run()
    check_unchanged(config, folder)
    other = changed(
        config, attention={"group_size": 64}, adapter={"targets": [f"layer_{n}_proj" for n in range(9)], "rank": 4}
    )
    with pytest.raises(ConfigError) as caught:
        check_unchanged(other, folder)
    assert str(caught.value) == (
        "run 'tiny' was started with other settings: attention.group_size: 128 → 64, adapter.rank: 8 → 4, "
        "adapter.targets: 'auto' → ['layer_0_proj', 'layer_1_proj', 'layer_…; give the run another name, or allow "
        "what changed with run.allow_config_change='[attention.group_size, adapter.rank, adapter.targets]'"
    )


def test_what_is_allowed_may_change(make_run: Callable) -> None:
    config, folder = make_run()
    both = {"optimization": {"learning_rate": 1e-3}, "attention": {"group_size": 64}}
    check_unchanged(changed(config, **both, run={"allow_config_change": list_of(both)}), folder)
    with pytest.raises(ConfigError, match=r"other settings: attention\.group_size: 128 → 64; give") as caught:
        check_unchanged(changed(config, **both, run={"allow_config_change": list_of(both)[:1]}), folder)
    assert "learning_rate" not in str(caught.value)


def list_of(sections: dict[str, dict[str, object]]) -> list[str]:
    return [f"{name}.{key}" for name, section in sections.items() for key in section]


def test_of_an_architecture_only_what_differs_is_named(tmp_path: Path, make_run: Callable) -> None:
    config, _ = make_run()
    shapes = {"model_type": "llama", "hidden_size": 32, "vocab_size": 258}
    random = {"base": None, "architecture": shapes, "tokenizer": config.model.base}
    before = changed(config, model=random)
    keep_config(before, UPath(tmp_path))
    after = changed(config, model={**random, "architecture": {**shapes, "hidden_size": 64, "num_hidden_layers": 3}})
    difference = r"model\.architecture\.hidden_size: 32 → 64, model\.architecture\.num_hidden_layers: None → 3; give"
    with pytest.raises(ConfigError, match=difference):
        check_unchanged(after, UPath(tmp_path))


def test_a_very_long_difference_ends(make_run: Callable) -> None:
    config, folder = make_run()
    many = {"alpha": 1, "rank": 1, "dropout": 0.5, "rslora": True, "dora": True, "train_norms": False}
    more = {"steps": 7, "global_batch": 7, "learning_rate": 1, "schedule": "cosine", "eps": 1, "weight_decay": 1}
    with pytest.raises(ConfigError, match="and 1 more; give"):
        check_unchanged(changed(config, adapter=many, optimization={**more, "max_grad_norm": 2}), folder)


def test_a_run_whose_storage_was_moved_is_resumed(make_run: Callable, tmp_path: Path) -> None:
    """Workers, paths and storage are not decisive: the fingerprints of packs and base say what they lead to."""
    config, folder = make_run()
    moved = UPath(shutil.move(folder.parent, tmp_path / "elsewhere")) / folder.name
    now = changed(config, run={"storage": str(moved.parent)}, workers={"min": 1, "max": 4})
    check_unchanged(now, moved)
    newest = checkpoints.newest(moved)
    assert newest == moved / "checkpoints" / "step-10"
    checkpoints.check_resumable(
        checkpoints.read_state(newest), "packs", checkpoints.base_fingerprint(config.model.base)
    )
    keep_config(now, moved)
    assert run_config(moved).run.storage == str(moved.parent)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run folder, it has no config\.yaml"):
        run_config(UPath(tmp_path))


def test_a_run_of_another_version_is_named(make_run: Callable) -> None:
    config, folder = make_run()
    values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    values["model"]["gradient_checkpointing"] = True
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        check_unchanged(config, folder)
    assert str(caught.value) == (
        f"{folder}/config.yaml was written by another version (model.gradient_checkpointing: unknown key; did you mean "
        "checkpoint?): give the run another name, or go on with that version"
    )
