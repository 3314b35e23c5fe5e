"""Checkpoint → tables and plots: what the longer context costs and what it brings, measured on held-out documents.

All models are run with ordinary dense attention, one after another, on the same target tokens:
- perplexity at several lengths, for the base, the base with its context extended but untrained, and the trained model.
  The longest length decides the pieces of text; shorter lengths divide the same pieces, so that lengths compare too;
- context use: the trained model's loss on fixed blocks with more and with less text before them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel
from upath import UPath

from longlora.context_use import BLOCK_TOKENS, ContextLoss, context_use, target_blocks
from longlora.perplexity import perplexity, windows
from pipeline import checkpoints, models
from pipeline.config import Config, ConfigError, local_path
from pipeline.documents import cut_units, find_sources, read_documents
from pipeline.evaluation_report import context_table, perplexity_plot, perplexity_table
from pipeline.run_config import run_config
from pipeline.storage import read_json, write_atomic, write_json
from pipeline.tokens import Tokenizer, tokenise

BASE, UNTRAINED, EXTENDED = "base", "base+rope", "extended"
Row = dict[str, Any]


@dataclass(frozen=True)
class Targets:
    """The held-out text that models are compared on."""

    lengths: list[int]
    """Context lengths of the perplexities, ascending."""
    pieces: list[Tensor]
    """Disjoint pieces of the longest length, plus one token, that windows of each length divide."""
    contexts: list[int]
    """Context lengths of the context-use test, ascending."""
    blocks: list[Tensor]
    """Its target blocks with the longest context before them; none if the test is left out."""


@dataclass(frozen=True)
class Evaluated:
    """What tracking is told of an evaluation: `eval/perplexity_<length>` of the trained model, after `step` steps."""

    step: int
    metrics: dict[str, float]


def evaluate(config: Config, run_folder: UPath) -> Evaluated | None:
    """Evaluates the newest checkpoint on `data.validation` and writes `<run>/evaluation/`; None without any documents.

    `perplexity.json`, `perplexity.png`, `context_use.json` (with `evaluation.context_blocks`), and last `state.json`,
    which tells that they are complete: a checkpoint that was evaluated with the same settings before is not again.
    Raises ConfigError if there is no checkpoint, or no held-out document is long enough.
    """
    console = Console()
    if not config.data.validation:
        console.print("nothing is evaluated: data.validation names no held-out documents")
        return None
    checkpoint = models.newest_checkpoint(run_folder)
    folder = run_folder / "evaluation"
    step = checkpoints.read_state(checkpoint).step
    state = {
        "step": step,
        "settings": config.evaluation.model_dump(mode="json", exclude={"every_steps", "rows"}),
        "documents": config.data.validation,
    }
    if (folder / "state.json").exists() and read_json(folder / "state.json") == state:
        console.print(f"evaluation of step {step} is up to date: {folder}")
        return Evaluated(step, _metrics(read_json(folder / "perplexity.json")))
    targets = select_targets(config, held_out_documents(config), console)
    rows, context_rows = _measure(config, checkpoint, targets, console)
    write_json(folder / "perplexity.json", rows)
    write_atomic(folder / "perplexity.png", perplexity_plot(rows, models.native_length(config)))
    console.print(perplexity_table(rows))
    if context_rows:
        write_json(folder / "context_use.json", context_report(context_rows, len(targets.blocks)))
        console.print(context_table(context_rows, len(targets.blocks), BLOCK_TOKENS))
    write_json(folder / "state.json", state)
    return Evaluated(step, _metrics(rows))


def _metrics(rows: list[Row]) -> dict[str, float]:
    return {f"eval/perplexity_{row['length']}": row["perplexity"] for row in rows if row["model"] == EXTENDED}


def context_use_of(run_folder: UPath, blocks: int) -> Row:
    """The form of `context_use.json` for the newest checkpoint of a run, with the run's name as model.

    Runs with equal held-out documents, tokenizer and evaluation lengths are measured on the same blocks.
    """
    config = run_config(run_folder)
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"context_blocks": blocks})})
    targets = select_targets(config, held_out_documents(config), Console(stderr=True))
    model = models.placed(models.trained_model(config, models.newest_checkpoint(run_folder)))
    losses = context_use(model, targets.blocks, targets.contexts)
    return context_report(_context_rows(config.run.name, losses), len(targets.blocks))


def context_report(rows: list[Row], blocks: int) -> Row:
    """The content of `context_use.json`."""
    return {"block_tokens": BLOCK_TOKENS, "blocks": blocks, "rows": rows}


def held_out_documents(config: Config) -> list[Tensor]:
    """Token ids, int32 (tokens,), of each readable document of `data.validation`, in the order of the sources."""
    key = "data.validation"
    sources = find_sources([local_path(entry) for entry in config.data.validation], key)
    units = cut_units(sources, config.data.unit_mb * 10**6, config.data.text_column, key)
    documents = (d for unit in units for d in read_documents(unit.parts, config.data.text_column) if d.skip is None)
    return [torch.from_numpy(ids) for _, ids in tokenise(documents, Tokenizer.load(config))]


def evaluation_lengths(config: Config) -> list[int]:
    """`evaluation.lengths`, by default the base's context, doubled up to `context.length`."""
    if config.evaluation.lengths:
        return sorted(set(config.evaluation.lengths))
    length, lengths = models.native_length(config), []
    while length < config.context.length:
        lengths.append(length)
        length *= 2
    return [*lengths, config.context.length]


def select_targets(config: Config, documents: Sequence[Tensor], console: Console) -> Targets:
    """What is measured: by the config and the documents alone, whatever the model.

    Lengths that no document reaches are left out, and named. ConfigError if none remains, or too few blocks do.
    """
    longest, wanted = max((len(tokens) for tokens in documents), default=0), evaluation_lengths(config)
    lengths = [length for length in wanted if length < longest]
    if not lengths:
        raise ConfigError(
            f"data.validation: the longest document has {longest} tokens, and {wanted[0]} tokens of context "
            f"(evaluation.lengths) need one of {wanted[0] + 1}"
        )
    if lengths != wanted:
        console.print(f"left out, for no held-out document is longer: lengths {wanted[len(lengths) :]}")
    pieces = windows(documents, lengths[-1], lengths[-1], max(1, config.evaluation.tokens // lengths[-1]))
    contexts = [length for length in lengths if length >= BLOCK_TOKENS]
    blocks: list[Tensor] = []
    if config.evaluation.context_blocks and len(contexts) > 1:
        try:
            blocks = target_blocks(documents, contexts[-1], config.evaluation.context_blocks)
        except ValueError as error:
            raise ConfigError(f"evaluation.context_blocks = {config.evaluation.context_blocks}: {error}") from None
    return Targets(lengths, pieces, contexts, blocks)


def _measure(config: Config, checkpoint: UPath, targets: Targets, console: Console) -> tuple[list[Row], list[Row]]:
    """Rows of perplexity.json and of context_use.json; one model in memory at a time."""
    rows: list[Row] = []
    context_rows: list[Row] = []
    candidates = _candidates(config, checkpoint)
    whole = sum(len(targets.pieces) * (targets.lengths[-1] // length) * length for length in targets.lengths)
    bar = Progress(TextColumn("{task.description:<22}"), BarColumn(), TimeRemainingColumn(), console=console)
    bar.disable = not console.is_terminal
    with bar:
        task = bar.add_task("", total=len(candidates) * whole + len(targets.blocks) * sum(targets.contexts))
        for name, load in candidates:
            bar.update(task, description=f"loading {name}")
            model = models.placed(load())
            for length in targets.lengths:
                bar.update(task, description=f"{name} at {length:,}")
                result = perplexity(model, targets.pieces, length, progress=lambda n: bar.advance(task, n))
                rows.append(
                    {
                        "model": name,
                        "length": length,
                        "perplexity": result.perplexity,
                        "perplexity_last256": result.perplexity_last256,
                        "tokens": result.tokens,
                    }
                )
                if not console.is_terminal:
                    console.print(f"{name} at {length:,} tokens: perplexity {result.perplexity:.2f}")
            if name == EXTENDED and targets.blocks:
                bar.update(task, description="context use")
                losses = context_use(model, targets.blocks, targets.contexts, lambda n: bar.advance(task, n))
                context_rows = _context_rows(name, losses)
            del model
    return rows, context_rows


def _candidates(config: Config, checkpoint: UPath) -> list[tuple[str, Callable[[], PreTrainedModel]]]:
    """The models to compare, by name, each to be loaded when its turn comes."""
    before: list[tuple[str, Callable[[], PreTrainedModel]]] = []
    if config.model.base is not None:
        before.append((BASE, lambda: models.base_model(config)))
        if models.native_length(config) < config.context.length:
            before.append((UNTRAINED, lambda: models.extended_base(config)))
    return [*before, (EXTENDED, lambda: models.trained_model(config, checkpoint))]


def _context_rows(name: str, losses: Sequence[ContextLoss]) -> list[Row]:
    return [
        {
            "model": name,
            "context": row.context,
            "loss": row.loss,
            "difference": row.difference,
            "interval95": list(row.interval95),
        }
        for row in losses
    ]
