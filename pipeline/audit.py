"""Was every sequence of every committed step trained exactly once, in order, and as it stands in the packs?

A step counts if the checkpoint that the run goes on from contains it: of each attempt, the steps before the one that a
later attempt started from, and before the newest checkpoint. Everything is read from the run's folder and its packs.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from upath import UPath

from pipeline.config import Config, ConfigError
from pipeline.lease import holder_of
from pipeline.ledger import Event, StepRecord, read_ledger, token_hash
from pipeline.order import positions_of_step, sequences_at
from pipeline.packs import Packs, row_hash
from pipeline.timeline import Line, Recovery, lost_seconds, recoveries, seconds_by_category


@dataclass(frozen=True)
class Audit:
    """Findings name steps; a run is whole if there are none."""

    committed: int
    """Steps that the newest checkpoint contains."""
    sequences: int
    """Sequences trained in them."""
    attempts: int
    trained: int
    """Steps that were trained, those that were trained again counted again."""
    redone: int
    """Steps that were trained again because no checkpoint contained them."""
    lost: list[int]
    """Committed steps that no record accounts for."""
    doubled: list[int]
    """Committed steps that two records account for: trained twice on top of each other."""
    misordered: list[int]
    """Steps whose sequences are not those of the run's order."""
    changed: list[int]
    """Steps that were given other tokens than the packs hold."""
    seconds: dict[str, float]
    """Wall time by category."""
    recoveries: list[Recovery]
    lost_per_disturbance: float
    """Mean seconds that a recovery cost, redone steps included."""
    holder: str = ""
    """Who is working on the run: what they train after the newest checkpoint does not count yet. Empty if nobody is."""

    @property
    def whole(self) -> bool:
        return not (self.lost or self.doubled or self.misordered or self.changed)


def audit(run_folder: UPath, packs: Packs, seed: int, global_batch: int, committed: int) -> Audit:
    """Reads the ledger of a run and the tokens that it names. committed: step of the newest checkpoint."""
    numbered = list(read_ledger(run_folder))
    lines = [line for _, line in numbered]
    counting = counting_steps(numbered, committed)
    records = [line for number in sorted(counting) if isinstance(line := lines[number], StepRecord)]
    times = Counter(record.step for record in records)
    steps = [line.step for line in lines if isinstance(line, StepRecord)]
    found = recoveries(lines)
    return Audit(
        committed=committed,
        sequences=sum(len(record.sequences) for record in records),
        attempts=max((attempt for attempt, _ in numbered), default=0),
        trained=len(steps),
        redone=len(steps) - len(set(steps)),
        lost=[step for step in range(committed) if not times[step]],
        doubled=sorted(step for step, count in times.items() if count > 1),
        misordered=[record.step for record in records if not _in_order(record, packs, seed, global_batch)],
        changed=[record.step for record in records if not _as_packed(record, packs)],
        seconds=seconds_by_category(lines, counting),
        recoveries=found,
        lost_per_disturbance=lost_seconds(lines, found),
    )


def audit_run(config: Config, run_folder: UPath) -> Audit:
    """The audit of a run, with the packs beside it; ConfigError if they are gone, or nothing is committed or recorded.

    config: that of the run; of its paths none is used, so that a run whose storage was moved can be audited.
    """
    from pipeline import checkpoints  # torch with it, which the rest of this file does without

    holder = holder_of(run_folder)
    newest = checkpoints.newest(run_folder)
    if newest is None:
        raise ConfigError(f"{run_folder}: has no checkpoint, so no step is committed; train first")
    if next(read_ledger(run_folder), None) is None:
        raise ConfigError(f"{run_folder}: has no ledger, so nothing says what its {newest.name} was trained on")
    state = checkpoints.read_state(newest)
    packs = Packs.open(run_folder.parent / "packs" / state.packs_fingerprint)
    result = audit(run_folder, packs, config.run.seed, config.optimization.global_batch, state.step)
    return replace(result, holder=str(holder or ""))


def counting_steps(numbered: Sequence[tuple[int, Line]], committed: int) -> set[int]:
    """Indices of the step records that the newest checkpoint contains, `committed` steps in."""
    started = {attempt: line.step for attempt, line in numbered if isinstance(line, Event) and line.event == "start"}
    horizon, lowest = {}, committed
    for attempt in sorted({attempt for attempt, _ in numbered}, reverse=True):
        horizon[attempt] = lowest
        lowest = min(lowest, started.get(attempt, lowest))
    return {
        number
        for number, (attempt, line) in enumerate(numbered)
        if isinstance(line, StepRecord) and line.step < horizon[attempt]
    }


def _in_order(record: StepRecord, packs: Packs, seed: int, global_batch: int) -> bool:
    positions = positions_of_step(record.step, global_batch)
    expected = sequences_at(positions, seed, packs.count)
    return (record.first_position, record.sequences) == (positions.start, expected)


def _as_packed(record: StepRecord, packs: Packs) -> bool:
    rows = [packs.row(sequence) for sequence in record.sequences]
    return record.token_hash == token_hash([row_hash(row.input_ids, row.document_lengths) for row in rows])
