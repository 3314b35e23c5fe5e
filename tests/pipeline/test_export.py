import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from upath import UPath

from longlora.perplexity import perplexity
from pipeline import export as module
from pipeline import models
from pipeline.config import Config, ConfigError
from pipeline.export import export

MakeRun = Callable[..., tuple[Config, UPath]]


def modified(folder: UPath) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in Path(str(folder)).iterdir()}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_plain_transformers_gets_the_perplexity_of_the_merged_model(make_run: MakeRun, kind: str) -> None:
    config, run_folder = make_run(kind)
    folder = str(export(config, run_folder))
    exported = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    merged = models.trained_model(config, models.newest_checkpoint(run_folder))
    untrained = models.extended_base(config)
    documents = [torch.randint(2, 258, (1025,), generator=torch.Generator().manual_seed(3))]
    for length in (256, 512):
        expected = perplexity(merged, documents, length).perplexity
        assert perplexity(exported, documents, length).perplexity == pytest.approx(expected, rel=1e-6)
        assert perplexity(untrained, documents, length).perplexity != pytest.approx(expected, rel=1e-2)


def test_export_carries_the_new_length(make_run: MakeRun) -> None:
    config, run_folder = make_run()
    folder = Path(str(export(config, run_folder)))
    saved = json.loads((folder / "config.json").read_text())
    assert saved["max_position_embeddings"] == 512
    assert saved["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 512
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 1
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}


def test_export_has_the_configured_type(make_run: MakeRun) -> None:
    config, run_folder = make_run(model={"dtype": "bfloat16"})
    model = AutoModelForCausalLM.from_pretrained(str(export(config, run_folder)), dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_tied_embeddings_stay_tied(make_run: MakeRun, tiny_base: Path, tmp_path: Path) -> None:
    settings = LlamaConfig.from_pretrained(tiny_base, tie_word_embeddings=True)
    LlamaForCausalLM(settings).save_pretrained(tmp_path / "tied")
    config, run_folder = make_run(model={"base": str(tmp_path / "tied"), "tokenizer": str(tiny_base)})
    folder = Path(str(export(config, run_folder)))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    trained = load_file(run_folder / "checkpoints" / "step-10" / "adapter_model.safetensors")
    torch.testing.assert_close(
        model.get_input_embeddings().weight.data, trained["base_model.model.model.embed_tokens.weight"]
    )


def test_model_card_tells_what_was_done(make_run: MakeRun) -> None:
    config, run_folder = make_run(attention={"full_last": 0.25})
    card = (export(config, run_folder) / "README.md").read_text()
    for fact in (
        "512 tokens",
        "256 tokens",
        "| tiny |",
        "linear",
        "groups of 128",
        "last 25%",
        "rank 8",
        "10 of 2 seq",
    ):
        assert fact in card
    assert "sliding window" not in card


def test_manifest_lists_every_file(make_run: MakeRun) -> None:
    config, run_folder = make_run()
    folder = Path(str(export(config, run_folder)))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 10
    assert {path.name for path in folder.iterdir()} == {*manifest["files"], "manifest.json"}
    assert all((folder / name).stat().st_size == entry["size"] for name, entry in manifest["files"].items())


def test_a_current_export_is_left_alone_and_an_older_one_replaced(
    make_run: MakeRun, commit_checkpoint: Callable[..., UPath]
) -> None:
    config, run_folder = make_run()
    before = modified(export(config, run_folder))
    assert modified(export(config, run_folder)) == before
    commit_checkpoint(config, run_folder, step=20)
    assert modified(export(config, run_folder)) != before
    assert json.loads((run_folder / "export" / "manifest.json").read_text())["step"] == 20
    assert sorted(path.name for path in run_folder.iterdir()) == ["checkpoints", "config.yaml", "export"]


def test_nothing_half_written_is_visible(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run_folder = make_run()
    save, seen = LlamaForCausalLM.save_pretrained, []

    def disk_full(model: LlamaForCausalLM, folder: Path, **options: Any) -> None:
        save(model, folder, **options)
        seen.append((Path(folder).exists(), (run_folder / "export").exists()))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", disk_full)
    with pytest.raises(ConfigError, match=r"run\.storage = .*No space left on device"):
        export(config, run_folder)
    assert seen == [(True, False)]
    assert sorted(path.name for path in run_folder.iterdir()) == ["checkpoints", "config.yaml"]


def test_a_failed_export_leaves_the_older_one(
    make_run: MakeRun, commit_checkpoint: Callable[..., UPath], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run_folder = make_run()
    before = modified(export(config, run_folder))
    commit_checkpoint(config, run_folder, step=20)
    monkeypatch.setattr(module, "_files", lambda folder: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError):
        export(config, run_folder)
    assert modified(run_folder / "export") == before


def test_object_stores_get_the_manifest_last(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run_folder = make_run(storage="memory://export-test")
    opened, open_file = [], type(run_folder).open

    def recording_open(path: UPath, mode: str = "r", **options: Any) -> Any:
        if "w" in mode:
            opened.append(path.name)
        return open_file(path, mode, **options)

    monkeypatch.setattr(type(run_folder), "open", recording_open)
    folder = export(config, run_folder)
    assert opened[-1] == "manifest.json"
    assert {path.name for path in folder.iterdir()} == set(opened) > {"model.safetensors", "config.json", "README.md"}
    assert len(opened) == len(set(opened))


def test_refuses_a_run_without_checkpoint_and_another_base(make_run: MakeRun, tiny_base: Path, tmp_path: Path) -> None:
    config, run_folder = make_run()
    with pytest.raises(ConfigError, match="no checkpoint"):
        export(config, run_folder / "elsewhere")
    LlamaForCausalLM.from_pretrained(tiny_base).double().save_pretrained(tmp_path / "other")
    other = config.model_copy(update={"model": config.model.model_copy(update={"base": str(tmp_path / "other")})})
    with pytest.raises(ConfigError, match="its weights differ"):
        export(other, run_folder)
