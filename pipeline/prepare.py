"""Stages 1–3: documents → packs, once, streaming through Ray Data.

The data set that Ray sees is a list of units of work. A worker tokenises and packs a unit and writes its shard; only
its summary comes back. What is committed stays: a unit by its summary, the packs by their manifest.
"""

import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from upath import UPath

from pipeline.config import Config, ConfigError, local_path
from pipeline.documents import Unit, cut_units, find_sources
from pipeline.packing import POLICY
from pipeline.packs import FORMAT, Packs
from pipeline.storage import remove_tree, storage_root, write_atomic, write_json
from pipeline.tokens import Tokenizer
from pipeline.unit_work import SKIPPED_SCHEMA, make_unit

LEFT_AFTER_S = 3600.0
"""A shard takes minutes: what has been in `scratch` for so long is nobody's."""


@dataclass(frozen=True)
class WantedPacks:
    """Packs that a config asks for: what they are made of, and where they lie once they are made."""

    key: str
    """`data.train` or `data.validation`."""
    folder: UPath
    content: dict[str, Any]
    """What decides the packs, and nothing else: no absolute path, no size of a cluster."""
    units: list[Unit]
    tokenizer: Tokenizer


@dataclass(frozen=True)
class PreparedPacks:
    """Folders of the packs."""

    train: UPath
    validation: UPath | None


def wanted_packs(config: Config) -> list[WantedPacks]:
    """The packs of `data.train` and, if it names any documents, `data.validation`. Looks the documents up; no Ray.

    Raises ConfigError for documents or a tokenizer that cannot be used.
    """
    tokenizer = Tokenizer.load(config)
    entries = {"data.train": config.data.train, "data.validation": config.data.validation}
    return [_wanted(config, tokenizer, key, named) for key, named in entries.items() if named]


def prepare(config: Config, wanted: list[WantedPacks]) -> PreparedPacks:
    """Makes the packs that are not there yet. Needs a connection to Ray.

    Raises ConfigError for documents that cannot be read, or hold nothing to train on.
    """
    folders = {packs.key: _prepare(config, packs) for packs in wanted}
    return PreparedPacks(folders["data.train"], folders.get("data.validation"))


def _wanted(config: Config, tokenizer: Tokenizer, key: str, entries: list[str]) -> WantedPacks:
    sources = find_sources([local_path(entry) for entry in entries], key)
    content = {
        "format": FORMAT,
        "tokenizer": hashlib.sha256(json.dumps(tokenizer.identity(), sort_keys=True).encode()).hexdigest(),
        "sequence_length": config.context.length,
        "packing": POLICY,
        "unit_mb": config.data.unit_mb,
        "text_column": config.data.text_column,
        "sources": [source.identity() for source in sources],
    }
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    units = cut_units(sources, config.data.unit_mb * 10**6, config.data.text_column, key)
    folder = storage_root(config) / "packs" / fingerprint
    return WantedPacks(key, folder, {"fingerprint": fingerprint, **content}, units, tokenizer)


def _prepare(config: Config, wanted: WantedPacks) -> UPath:
    key, folder, tokenizer = wanted.key, wanted.folder, wanted.tokenizer
    if (folder / "manifest.json").exists():
        packs = _whole(folder)
        if packs is not None:
            print(f"{key}: packs {folder.name} are ready, {packs.count} sequences", flush=True)
            return folder
    print(f"{key}: {len(wanted.content['sources'])} files, {len(wanted.units)} units of work → {folder}", flush=True)
    write_atomic(folder / "tokenizer.json", tokenizer.definition.encode())
    work = (str(folder), tokenizer.eos, config.context.length, config.data.text_column)
    _commit(folder, wanted.content, _pack_units(wanted.units, work, key), key)
    return folder


def _whole(folder: UPath) -> Packs | None:
    """The packs, or None where a shard is missing or cut off and has to be made again."""
    try:
        return Packs.open(folder)
    except ConfigError as error:
        print(f"{error}", flush=True)
        return None


def _pack_units(units: list[Unit], work: tuple[str, int | None, int, str], key: str) -> list[dict[str, Any]]:
    """The summaries of all units, in order. Ray Data spreads the units over the cluster's CPUs, one task each."""
    import ray

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = sys.stderr.isatty()
    context.print_on_execution_start = False
    _keep_to_the_log_file(logging.getLogger("ray.data"))
    summaries: dict[int, dict[str, Any]] = {}
    with ray.data.DataContext.current(context):
        table = [{"unit": unit.index, "description": unit.to_json()} for unit in units]
        rows = ray.data.from_items(table, override_num_blocks=len(table))
        tasks = rows.map(make_unit, fn_args=work, num_cpus=1)  # type: ignore[arg-type]  # its type forgets fn_args
        for result in tasks.iter_rows():
            if result["error"]:
                raise ConfigError(f"{key}: {result['error']}")
            summaries[result["unit"]] = json.loads(result["summary"])
            tokens = sum(summary["tokens"] for summary in summaries.values())
            print(f"{key}: {len(summaries)} of {len(units)} units, {tokens:,} tokens", flush=True)
    return [summaries[unit.index] for unit in units]


def _keep_to_the_log_file(logger: logging.Logger) -> None:
    """Ray Data's messages stay in Ray's log folder: what a user must know is told in a line of ours."""
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)


def _commit(folder: UPath, content: dict[str, Any], summaries: list[dict[str, Any]], key: str) -> None:
    """Writes skipped.parquet and the manifest, which commits the packs."""
    skipped = Counter[str]()
    shards, first = [], 0
    for summary in summaries:
        skipped.update(summary["skipped"])
        names = ("name", "rows", "tokens", "target_tokens", "bytes", "sha256")
        shards.append({**{name: summary[name] for name in names}, "first_sequence": first})
        first += summary["rows"]
    packed = sum(summary["documents"] for summary in summaries)
    counts = {"read": packed + skipped.total(), "packed": packed, "skipped": dict(sorted(skipped.items()))}
    if first == 0:
        remove_tree(folder)
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items())) or "no document"
        raise ConfigError(f"{key}: nothing to train on in {counts['read']} documents ({reasons})")
    _write_skipped(folder)
    totals = {name: sum(shard[name] for shard in shards) for name in ("tokens", "target_tokens")}
    write_json(
        folder / "manifest.json", {**content, "sequences": first, **totals, "documents": counts, "shards": shards}
    )
    _clear(folder / "scratch")
    print(f"{key}: {first} sequences, {totals['tokens']:,} tokens, documents {counts}", flush=True)


def _clear(scratch: UPath) -> None:
    """Deletes what killed tasks have left; what is fresh may be that of another driver that makes the same packs."""
    if not scratch.exists():
        return
    for left in scratch.iterdir():
        if left.stat().st_mtime < time.time() - LEFT_AFTER_S:
            remove_tree(left)
    with suppress(OSError):  # not empty
        scratch.rmdir()


def _write_skipped(folder: UPath) -> None:
    """Joins the units' lists of skipped documents, in order."""
    parts = sorted((folder / "units").glob("*.skipped.parquet"), key=str)
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "skipped.parquet")
        with pq.ParquetWriter(path, SKIPPED_SCHEMA) as file:
            for part in parts:
                with part.fs.open(part.path, "rb") as source:
                    file.write_table(pq.read_table(source))
        write_atomic(folder / "skipped.parquet", UPath(path).read_bytes())
