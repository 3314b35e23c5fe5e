"""Files are data: pickles and a model's own code are refused in one line, and nothing of them runs.

Each hostile file would make a folder if it were unpickled or executed.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data  # noqa: F401  # registers its own column types, one of which unpickles what it reads
import torch
from upath import UPath

from pipeline import checkpoints, models
from pipeline.config import Config, ConfigError
from pipeline.documents import Part, cut_units, find_sources, read_documents
from pipeline.generate import generate
from pipeline.packs import SCHEMA, Packs, Row, ShardWriter
from pipeline.stages import check_model
from pipeline.tokens import Tokenizer

MakeRun = Callable[..., tuple[Config, UPath]]


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What no test may leave behind. Whoever is asked whether to run code says yes."""
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "marker"


def refused(marker: Path, work: Callable[[], object], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message) as caught:
        work()
    assert "\n" not in str(caught.value)
    assert not marker.exists(), "it ran"


def test_the_hostile_files_do_what_they_say(marker: Path) -> None:
    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists()


def text_of(model: Path) -> Callable[[], object]:
    return lambda: list(generate(str(model), "the cat", 1, 0, 0))


def test_pickled_base_weights(make_run: MakeRun, tiny_base: Path, tmp_path: Path, marker: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Hostile(marker)}, base / "pytorch_model.bin")
    config, _ = make_run()
    config = config.model_copy(update={"model": config.model.model_copy(update={"base": str(base)})})
    refused(marker, lambda: models.build_model(config), "no file named model.safetensors")
    refused(marker, text_of(base), "no file named model.safetensors")


def test_a_pickled_adapter(make_run: MakeRun, tmp_path: Path, marker: Path) -> None:
    _, run = make_run()
    adapter = Path(shutil.copytree(str(models.newest_checkpoint(run)), tmp_path / "adapter"))
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"lora_A": Hostile(marker)}, adapter / "adapter_model.bin")
    refused(marker, text_of(adapter), "has no adapter_model.safetensors")


def test_a_checkpoint_with_a_pickle_is_none(make_run: MakeRun, marker: Path) -> None:
    """Also if its manifest, made anew, lists the pickle with the right hash."""
    _, run = make_run()
    folder = Path(str(models.newest_checkpoint(run)))
    manifest = json.loads((folder / "manifest.json").read_text())
    torch.save({"lora_A": Hostile(marker)}, folder / "adapter_model.bin")
    content = (folder / "adapter_model.bin").read_bytes()
    (folder / "adapter_model.safetensors").unlink()
    del manifest["files"]["adapter_model.safetensors"]
    manifest["files"]["adapter_model.bin"] = {"size": len(content), "sha256": sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoints.damage(UPath(folder)) == "'adapter_model.bin' is no file of a checkpoint"
    refused(marker, lambda: models.newest_checkpoint(run), "has no checkpoint")
    refused(marker, text_of(folder), "has no adapter_model.safetensors")


@pytest.mark.parametrize("model_type", ["llama", "their-own"])
def test_code_that_comes_with_a_model(
    model_type: str, make_run: MakeRun, tiny_base: Path, tmp_path: Path, marker: Path
) -> None:
    """A known family is read without the code; one that is not known cannot be read."""
    base = with_code(tiny_base, tmp_path, marker)
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    described = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(described | {"model_type": model_type, "auto_map": classes}))
    config, _ = make_run()
    config = config.model_copy(update={"model": config.model.model_copy(update={"base": str(base)})})
    if model_type == "llama":
        models.build_model(config)
        list(generate(str(base), "the cat", 1, 0, 0))
        assert not marker.exists()
    else:
        refused(marker, lambda: models.build_model(config), "contains custom code")
        refused(marker, text_of(base), "contains custom code")


def test_code_that_comes_with_a_tokenizer(make_run: MakeRun, tiny_base: Path, tmp_path: Path, marker: Path) -> None:
    base = with_code(tiny_base, tmp_path, marker)
    (base / "tokenizer.json").unlink()
    code = {"tokenizer_class": "Their", "auto_map": {"AutoTokenizer": ["code.Their", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(code))
    config, _ = make_run()
    config = config.model_copy(update={"model": config.model.model_copy(update={"tokenizer": str(base)})})
    refused(marker, lambda: check_model(config), "model.tokenizer = .*contains custom code")
    refused(marker, lambda: Tokenizer.load(config), "model.tokenizer = .*contains custom code")
    refused(marker, text_of(base), "contains custom code")


def with_code(tiny_base: Path, tmp_path: Path, marker: Path) -> Path:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "code.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    return base


def column(kind: str, marker: Path) -> tuple[pa.Field, pa.Array]:
    """A column of one of Ray Data's types: of objects, or with a description that older versions unpickled."""
    hostile = pickle.dumps(Hostile(marker))
    name = {"objects": "ray.data.arrow_pickled_object", "tensors": "ray.data.arrow_tensor"}[kind]
    plain = pa.array([hostile], pa.large_binary()) if kind == "objects" else pa.array([[1]], pa.list_(pa.int32()))
    metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": hostile if kind == "tensors" else b""}
    return pa.field("text", plain.type, metadata=metadata), plain


@pytest.mark.parametrize("kind", ["objects", "tensors"])
def test_documents_with_pickles(kind: str, tmp_path: Path, marker: Path) -> None:
    field, values = column(kind, marker)
    pq.write_table(pa.table([values], schema=pa.schema([field])), tmp_path / "books.parquet")
    sources = find_sources([str(tmp_path / "books.parquet")], "data.train")
    refused(marker, lambda: cut_units(sources, 1 << 20, "text", "data.train"), "books.parquet")
    with suppress(ConfigError):
        documents = read_documents([Part(str(tmp_path / "books.parquet"), "books.parquet")], "text")
        assert [document.skip for document in documents] == ["not_utf8"]
    assert not marker.exists()


def test_packs_with_pickles(tmp_path: Path, marker: Path) -> None:
    """Whoever may write to the bucket can exchange a shard of as many bytes."""
    folder = tmp_path / "packs"
    (folder / "shards").mkdir(parents=True)
    with ShardWriter(str(folder / "shards" / "0.parquet"), 4) as writer:
        writer.write(Row(torch.arange(4, dtype=torch.int32).numpy(), (4,), ("a",)))
    shard = pq.read_table(folder / "shards" / "0.parquet")
    field, values = column("objects", marker)
    at = SCHEMA.get_field_index("document_lengths")
    pq.write_table(shard.set_column(at, field.with_name("document_lengths"), values), folder / "shards" / "0.parquet")
    size = (folder / "shards" / "0.parquet").stat().st_size
    described = {"name": "shards/0.parquet", "bytes": size, "first_sequence": 0}
    content = {"format": 1, "fingerprint": "0", "sequences": 1, "shards": [described]}
    (folder / "manifest.json").write_text(json.dumps(content))
    packs = Packs.open(UPath(folder))
    refused(marker, lambda: packs.row(0), "other columns than packs have")
