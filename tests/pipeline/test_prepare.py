"""Documents to committed packs, without Ray where its part does not matter, and through Ray Data where it does."""

import json
import os
import shutil
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from pipeline import prepare as stage
from pipeline import unit_work
from pipeline.config import REPOSITORY, Config, ConfigError, parse_config
from pipeline.documents import Unit
from pipeline.packs import Packs
from pipeline.prepare import PreparedPacks, wanted_packs
from pipeline.tokens import Tokenizer

LENGTH = 32
TABLE = [f"cell {n} " * (n % 6 + 1) for n in range(300)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """318 documents, in every format, and six that cannot be used."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n in range(6):
        (folder / f"note-{n}.txt").write_text("word " * (7 * n + 1))
    (folder / "empty.txt").write_text("")
    (folder / "latin.md").write_bytes(b"caf\xe9")
    texts = [f"row {n} " * (n + 1) for n in range(6)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts) + '{"text": null}\n{"text": \n'
    for suffix, codec in (("gz", "gzip"), ("zst", "zstd")):
        with pa.CompressedOutputStream(str(folder / f"lines.jsonl.{suffix}"), codec) as file:
            file.write(lines.encode())
    pq.write_table(pa.table({"text": TABLE}), folder / "table.parquet", row_group_size=100)
    return folder


@pytest.fixture
def config(tmp_path: Path, corpus: Path, tiny_base: Path) -> Config:
    return parse_config(
        {
            "run": {"name": "t", "storage": str(tmp_path / "store")},
            "model": {"architecture": {"model_type": "llama"}, "tokenizer": str(tiny_base)},
            "context": {"length": LENGTH},
            "attention": {"group_size": None},
            "data": {"train": [str(corpus)]},
            "optimization": {"steps": 30, "global_batch": 2},
        }
    )


def prepare(config: Config) -> PreparedPacks:
    return stage.prepare(config, wanted_packs(config))


def with_data(config: Config, **data: Any) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replaces Ray by a loop that goes through the units backwards; the list tells which were made, not found."""
    made: list[int] = []
    original = unit_work.UnitWork.make

    def make(self: unit_work.UnitWork, unit: Unit) -> dict[str, Any]:
        made.append(unit.index)
        return original(self, unit)

    def loop(units: list[Unit], work: tuple[str, int | None, int, str], key: str) -> list[dict[str, Any]]:
        rows = [{"unit": unit.index, "description": unit.to_json()} for unit in reversed(units)]
        results = [unit_work.make_unit(row, *work) for row in rows]
        errors = [result["error"] for result in results if result["error"]]
        if errors:
            raise ConfigError(f"{key}: {errors[0]}")
        return [json.loads(result["summary"]) for result in reversed(results)]

    monkeypatch.setattr(unit_work.UnitWork, "make", make)
    monkeypatch.setattr(stage, "_pack_units", loop)
    monkeypatch.setattr(stage, "cut_units", small_units(stage.cut_units))
    return made


def small_units(cut: Callable[..., list[Unit]]) -> Callable[..., list[Unit]]:
    """`data.unit_mb` is in whole megabytes; the tests' corpus is cut at 400 bytes."""
    return lambda sources, unit_bytes, column, key: cut(sources, 400, column, key)


def ids_of(folder: UPath) -> dict[str, list[int]]:
    """The token ids of each document, put together again from the packs: its pieces follow one another."""
    packs = Packs.open(folder)
    ids: dict[str, list[int]] = {}
    for n in range(packs.count):
        row = packs.row(n)
        assert len(row.input_ids) <= LENGTH
        parts = np.split(row.input_ids, np.cumsum(row.document_lengths)[:-1])
        for document, part in zip(row.document_ids, parts, strict=True):
            ids.setdefault(document, []).extend(part.tolist())
    return ids


def manifest(folder: UPath) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_bytes())


def files_of(folder: UPath) -> dict[str, bytes]:
    return {str(path.relative_to(str(folder))): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_every_document_is_packed_or_skipped_for_a_reason(config: Config, corpus: Path, made: list[int]) -> None:
    folder = prepare(config).train
    texts = [f"row {n} " * (n + 1) for n in range(6)]
    expected = {f"note-{n}.txt": "word " * (7 * n + 1) for n in range(6)}
    expected |= {f"lines.jsonl.{suffix}#{n}": text for suffix in ("gz", "zst") for n, text in enumerate(texts)}
    expected |= {f"table.parquet#{n}": text for n, text in enumerate(TABLE)}
    ids = Tokenizer.load(config).encode(list(expected.values()))
    assert ids_of(folder) == {name: i.tolist() for name, i in zip(expected, ids, strict=True)}

    skipped = pq.read_table(str(folder / "skipped.parquet")).to_pylist()
    assert [(row["document_id"], row["reason"]) for row in skipped] == [
        ("empty.txt", "empty"),
        ("latin.md", "not_utf8"),
        ("lines.jsonl.gz#6", "missing_text"),
        ("lines.jsonl.gz#7", "not_json"),
        ("lines.jsonl.zst#6", "missing_text"),
        ("lines.jsonl.zst#7", "not_json"),
    ]
    written = manifest(folder)
    assert written["documents"] == {
        "read": 324,
        "packed": 318,
        "skipped": {"empty": 1, "missing_text": 2, "not_json": 2, "not_utf8": 1},
    }
    assert written["tokens"] == sum(map(len, ids))


def test_the_manifest_adds_up(config: Config, made: list[int]) -> None:
    folder = prepare(config).train
    packs, written = Packs.open(folder), manifest(folder)
    packs.verify()
    assert len(made) == len(written["shards"]) > 3
    assert folder.name == written["fingerprint"]
    first = 0
    for shard in written["shards"]:
        rows = [packs.row(n) for n in range(first, first + shard["rows"])]
        assert shard["first_sequence"] == first
        assert shard["tokens"] == sum(len(row.input_ids) for row in rows)
        assert shard["target_tokens"] == sum(row.target_tokens for row in rows)
        first += shard["rows"]
    assert written["sequences"] == packs.count == first
    for name in ("tokens", "target_tokens"):
        assert written[name] == sum(shard[name] for shard in written["shards"])


def test_documents_too_short_to_predict_anything_are_skipped(config: Config, tmp_path: Path, made: list[int]) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(config.model.tokenizer_source, folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(definition | {"post_processor": None}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None, "bos_token": None}))
    data = tmp_path / "data"
    data.mkdir()
    (data / "one.txt").write_text("x")
    (data / "two.txt").write_text("xy")
    model = config.model.model_copy(update={"tokenizer": str(folder)})
    packs = prepare(with_data(config.model_copy(update={"model": model}), train=[str(data)])).train
    assert manifest(packs)["documents"] == {"read": 2, "packed": 1, "skipped": {"too_short": 1}}
    assert len(ids_of(packs)["two.txt"]) == 2


def test_a_second_call_makes_nothing(config: Config, made: list[int]) -> None:
    folder = prepare(config).train
    before = {name: (Path(folder) / name).stat().st_mtime_ns for name in files_of(folder)}
    made.clear()
    assert prepare(config).train == folder
    assert made == []
    assert {name: (Path(folder) / name).stat().st_mtime_ns for name in files_of(folder)} == before


def test_what_was_interrupted_is_resumed(
    config: Config, tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files_of(prepare(config).train)
    again = config.model_copy(update={"run": config.run.model_copy(update={"storage": str(tmp_path / "again")})})
    place, placed = unit_work._place, list[str]()

    def dying(file: str, target: UPath) -> None:
        placed.append(target.name)
        if len(placed) == 4:
            raise KeyboardInterrupt
        place(file, target)

    made.clear()
    monkeypatch.setattr(unit_work, "_place", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare(again)
    monkeypatch.setattr(unit_work, "_place", place)
    folder = next((tmp_path / "again" / "packs").iterdir())
    assert not (folder / "manifest.json").exists()
    begun, committed = set(made), {int(path.stem) for path in (folder / "units").glob("?????.json")}
    assert begun - committed == {made[-1]}
    cut = min(committed)  # the disk lost the end of a shard whose summary it kept
    shard = folder / f"shards/{cut:05d}.parquet"
    shard.write_bytes(shard.read_bytes()[:-10])
    (folder / "scratch" / "left-behind").mkdir()
    os.utime(folder / "scratch" / "left-behind", (0, 0))

    made.clear()
    assert Path(prepare(again).train) == folder
    assert set(made) == set(range(len(manifest(UPath(folder))["shards"]))) - (committed - {cut})
    assert files_of(UPath(folder)) == whole
    assert not (folder / "scratch").exists()


def test_another_driver_that_makes_the_same_packs_keeps_its_scratch(config: Config, made: list[int]) -> None:
    wanted, *_ = wanted_packs(config)
    theirs = Path(wanted.folder) / "scratch" / "of-another"
    theirs.mkdir(parents=True)
    prepare(config)
    assert theirs.is_dir()


def test_a_shard_that_was_cut_off_later_is_made_again(config: Config, made: list[int]) -> None:
    folder = prepare(config).train
    whole = files_of(folder)
    shard = folder / "shards/00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    made.clear()
    prepare(config)
    assert made == [2]
    assert files_of(folder) == whole


def test_the_fingerprint_is_of_content_alone(config: Config, corpus: Path, tmp_path: Path, made: list[int]) -> None:
    fingerprint = prepare(config).train.name
    shutil.copytree(corpus, tmp_path / "elsewhere")
    assert prepare(with_data(config, train=[str(tmp_path / "elsewhere")])).train.name == fingerprint
    assert str(tmp_path) not in (prepare(config).train / "manifest.json").read_text()
    shorter = config.model_copy(update={"context": config.context.model_copy(update={"length": 16})})
    others = {fingerprint, prepare(shorter).train.name}
    others.add(prepare(with_data(config, unit_mb=5)).train.name)
    (corpus / "note-0.txt").write_text("WORD ")
    others.add(prepare(config).train.name)
    (corpus / "note-0.txt").rename(corpus / "note-9.txt")
    others.add(prepare(config).train.name)
    assert len(others) == 5


def test_validation_has_packs_of_its_own(config: Config, corpus: Path, made: list[int]) -> None:
    packs = prepare(with_data(config, validation=[str(corpus / "note-5.txt")]))
    assert packs.validation is not None and packs.validation != packs.train
    assert list(ids_of(packs.validation)) == ["note-5.txt"]
    assert prepare(config).validation is None


def test_a_corpus_without_text_is_refused_and_leaves_nothing(config: Config, tmp_path: Path, made: list[int]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_text(" \n")
    (tmp_path / "data/b.jsonl").write_text('{"body": "x"}\n' * 3)
    with pytest.raises(
        ConfigError, match=r"data.train: nothing to train on in 4 documents \(1 empty, 3 missing_text\)"
    ):
        prepare(with_data(config, train=[str(tmp_path / "data")]))
    assert list((tmp_path / "store/packs").iterdir()) == []


def test_a_damaged_file_is_refused_by_name(config: Config, corpus: Path, made: list[int]) -> None:
    path = corpus / "lines.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"data.train: 'lines.jsonl.gz' cannot be read"):
        prepare(config)


def test_a_full_disk_is_reported_in_one_line(config: Config, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: str, target: UPath) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unit_work, "_place", full)
    with pytest.raises(ConfigError, match=r"below run.storage \(.*No space left on device\)") as error:
        prepare(config)
    assert "\n" not in str(error.value)


def test_memory_holds_a_window_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_work, "WINDOW_TOKENS", 1000)
    alive = Counter[str]()
    most = 0

    def documents() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal most
        for n in range(500):
            ids = np.full(50, n, np.int32)
            alive["documents"] += 1
            weakref.finalize(ids, alive.subtract, ["documents"])
            most = max(most, alive["documents"])
            yield str(n), ids

    rows = sum(1 for _ in unit_work._rows(documents(), LENGTH))
    assert rows >= 500 * 50 / LENGTH
    assert 20 <= most <= 25  # a window closes at 1000 tokens: 20 documents, and the few that are on their way


def test_a_window_is_packed_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_work, "WINDOW_TOKENS", 40)
    documents = [(str(n), np.full(20, n, np.int32)) for n in range(5)]
    rows = list(unit_work._rows(documents, LENGTH))
    assert [row.document_ids for row in rows] == [("0",), ("1",), ("2",), ("3",), ("4",)]
    monkeypatch.setattr(unit_work, "WINDOW_TOKENS", 1000)
    rows = list(unit_work._rows([(name, ids[:16]) for name, ids in documents], LENGTH))
    assert [row.document_ids for row in rows] == [("0", "1"), ("2", "3"), ("4",)]


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        # As in pipeline/session.py: on loopback, and without a thread that outlives this Ray.
        patch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
        patch.setenv("RAY_DATA_USAGE_DISABLED", "1")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            logging_level="error",
            runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY)}},
        )
        yield
        ray.shutdown()


def test_ray_data_makes_the_same_packs_on_any_number_of_cpus(
    config: Config, corpus: Path, tmp_path: Path, two_cpus: None, request: pytest.FixtureRequest
) -> None:
    import ray

    def packs(name: str) -> dict[str, bytes]:
        run = config.run.model_copy(update={"storage": str(tmp_path / name)})
        return files_of(prepare(config.model_copy(update={"run": run})).train)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "cut_units", small_units(stage.cut_units))
        on_two = packs("two")
        occupied = ray.util.placement_group([{"CPU": 1}])
        assert occupied.wait(300)
        assert packs("one") == on_two
        damaged = corpus / "lines.jsonl.zst"
        content = damaged.read_bytes()
        damaged.write_bytes(content[:-9])  # what a worker finds wrong arrives as one line
        with pytest.raises(ConfigError, match=r"^data.train: 'lines.jsonl.zst' cannot be read \(.*\)$"):
            packs("damaged")
        damaged.write_bytes(content)
        ray.util.remove_placement_group(occupied)
    request.getfixturevalue("made")  # without Ray, one unit after the other, the last one first
    assert packs("alone") == on_two
