"""Checkpoint → a Hugging Face folder that plain transformers loads at the new length, without any of this project.

The folder appears whole or not at all: it is made beside its place, then renamed. Object stores know no renaming; there
`manifest.json`, with the size and hash of every file, is uploaded last, and a folder without it is no export.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from upath import UPath

from pipeline import checkpoints, models
from pipeline.config import Config, ConfigError, local_path
from pipeline.storage import is_local, read_json, remove_tree, sync_folder, write_json

MANIFEST = "manifest.json"
UNFINISHED = ".export"
CHUNK = 1 << 24


def export(config: Config, run_folder: UPath) -> UPath:
    """Writes `<run>/export/` from the newest checkpoint, in `model.dtype`, and returns it.

    safetensors, config with `rope_parameters`, generation config, tokenizer, and a model card. Nothing is done if the
    export of that step is there. ConfigError if there is no checkpoint, or the storage takes no more.
    """
    checkpoint = models.newest_checkpoint(run_folder)
    destination = run_folder / "export"
    step = checkpoints.read_state(checkpoint).step
    made_from = {"step": step, "dtype": config.model.dtype}
    if is_current(destination, made_from):
        return destination
    try:
        with _workplace(run_folder) as folder:
            _save(config, models.trained_model(config, checkpoint), step, folder)
            write_json(UPath(folder / MANIFEST), {**made_from, "files": _files(folder)})
            (_rename if is_local(destination) else _upload)(folder, destination)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"run.storage = {config.run.storage!r}: the export cannot be written ({reason})") from error
    return destination


def is_current(folder: UPath, made_from: dict[str, Any]) -> bool:
    """Whether `folder` is a finished export of that step and type."""
    if not (folder / MANIFEST).exists():
        return False
    manifest = read_json(folder / MANIFEST)
    return all(manifest[key] == value for key, value in made_from.items())


@contextmanager
def _workplace(run_folder: UPath) -> Iterator[Path]:
    """A local folder to make the export in, gone afterwards: beside its place, so that renaming moves no data."""
    if not is_local(run_folder):
        with tempfile.TemporaryDirectory(prefix="longlora-") as elsewhere:
            yield Path(elsewhere) / "export"
        return
    parent = Path(str(run_folder)) / UNFINISHED
    shutil.rmtree(parent, ignore_errors=True)  # of an export that was killed
    try:
        yield parent / "export"
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def _save(config: Config, model: PreTrainedModel, step: int, folder: Path) -> None:
    tokenizer = models.tokenizer_of(config)
    tokenizer.model_max_length = config.context.length
    if config.model.base is None:
        model.config.bos_token_id = tokenizer.bos_token_id
        model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config = _generation_config(config, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(config, model.config, step), encoding="utf-8")


def _generation_config(config: Config, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """That of the base, its limit raised to `context.length`; without one, what the tokenizer's special tokens say."""
    if config.model.base is not None:
        try:
            revision = config.model.revision or "main"
            base = GenerationConfig.from_pretrained(local_path(config.model.base), revision=revision)
        except OSError:
            pass  # transformers' way to say that there is no generation_config.json
        else:
            if base.max_length is not None:
                base.max_length = config.context.length
            return base
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each file, made durable on the way."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.name] = {"size": path.stat().st_size, "sha256": digest}
    return files


def _rename(folder: Path, destination: UPath) -> None:
    """Puts `folder` in the place of `destination`; an older export goes where `folder` is deleted from."""
    if destination.exists():
        os.rename(str(destination), folder.parent / "replaced")
    os.rename(folder, str(destination))
    sync_folder(destination.parent)


def _upload(folder: Path, destination: UPath) -> None:
    if destination.exists():
        (destination / MANIFEST).unlink(missing_ok=True)  # first: what is half replaced must not look finished
        remove_tree(destination)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
        with path.open("rb") as source, (destination / path.name).open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK)


def model_card(config: Config, exported: PreTrainedConfig, step: int) -> str:
    """README.md of an export: what it is and how it came about."""
    run, context = config.run.name, config.context.length
    facts = {
        "base": Path(config.model.base).name if config.model.base else "random weights",
        "context of the base": f"{models.native_length(config):,} tokens",
        "context now": f"{context:,} tokens",
        "rotary positions": f"{config.context.rope}: `{exported.rope_parameters}`",
        "training": f"LongLoRA (arXiv 2309.12307), {_attention(config)}; {_trained_part(config)}",
        "steps": f"{step:,} of {config.optimization.global_batch:,} sequences",
        "type": config.model.dtype,
    }
    window = config.model.base and getattr(models.published_config(config), "sliding_window", None)
    if window and getattr(exported, "sliding_window", None) is None:
        facts["sliding window"] = f"removed ({window:,} tokens in the base)"
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        f"# {run}\n\nA causal language model with a context of {context:,} tokens. It runs with ordinary dense "
        "attention, transformers' default; its config holds the rotary scaling that it needs, so keep the two "
        f"together. The licence of the base model applies.\n\n| | |\n|---|---|\n{table}\n"
    )


def _attention(config: Config) -> str:
    group, full_last = config.attention.group_size, config.attention.full_last
    if group is None:
        return "full attention"
    finish = f", full attention in the last {full_last:.0%} of the steps" if full_last else ""
    return f"S²-Attn with groups of {group:,} tokens{finish}"


def _trained_part(config: Config) -> str:
    adapter = config.adapter
    if adapter.kind == "full":
        return "all weights"
    parts = [f"LoRA of rank {adapter.rank}"]
    parts += ["embeddings"] if adapter.train_embeddings else []
    parts += ["norms"] if adapter.train_norms else []
    return ", ".join(parts) + ", merged"
