"""What `chaos.py` finds: a disturbed run against undisturbed ones, by their ledgers, checkpoints and MLflow runs."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from chaos_stage import CHECKPOINT_EVERY, Disturbance
from figures import machine
from mlflow import MlflowClient
from safetensors import torch as safetensors
from spot_cluster import DisturbedRun
from upath import UPath

from pipeline import checkpoints
from pipeline.audit import Audit, audit_run
from pipeline.config import load_config
from pipeline.ledger import StepRecord, read_ledger
from pipeline.storage import read_json
from pipeline.timeline import goodput, goodput_at

LOSS_BOUND, GOODPUT_BOUND = 1e-5, 0.9


@dataclass(frozen=True)
class Reference:
    """An undisturbed run."""

    size: int
    """Its number of workers."""
    folder: UPath


@dataclass(frozen=True)
class Findings:
    audit: Audit
    foreign: int
    """Steps whose sequences or tokens are not those of the undisturbed run."""
    loss_deviation: float
    """Largest relative one from any undisturbed run."""
    weight_deviation: float
    """Relative, of the last checkpoints; the largest from any undisturbed run."""
    undisturbed_deviation: float
    """The largest between two undisturbed runs; 0 if there is one."""
    metrics_missing: int
    metrics_doubled: int
    fixed: bool
    """Whether there was one number of workers."""

    @property
    def hourly_goodput(self) -> float:
        """At one disturbance an hour, by what this run's disturbances cost."""
        return goodput_at(3600, self.audit.seconds, self.audit.lost_per_disturbance)

    @property
    def holds(self) -> bool:
        """Whether every bound holds."""
        clean = self.audit.whole and not (self.foreign or self.metrics_missing or self.metrics_doubled)
        clean = clean and self.hourly_goodput >= GOODPUT_BOUND
        if self.fixed:
            return clean and self.loss_deviation == self.weight_deviation == 0
        return clean and self.loss_deviation <= LOSS_BOUND and self.weight_deviation <= 2 * self.undisturbed_deviation


def examine(run: DisturbedRun, references: Sequence[Reference]) -> Findings:
    """Compares a finished run with the undisturbed ones."""
    config = load_config(run.config)
    steps = config.optimization.steps
    trained = _steps(run.folder)
    losses, foreign = 0.0, 0
    for reference in references:
        expected = _steps(reference.folder)
        foreign += sum(_data(trained[step]) != _data(expected[step]) for step in range(steps))
        losses = max(losses, *(abs(trained[n].loss / expected[n].loss - 1) for n in range(steps)))
    weights = [_weights(reference.folder) for reference in references]
    counts = _metric_counts(config.tracking.uri or "", run.folder)
    return Findings(
        audit=audit_run(config, run.folder),
        foreign=foreign,
        loss_deviation=losses,
        weight_deviation=max(_deviation(_weights(run.folder), other) for other in weights),
        undisturbed_deviation=max((_deviation(a, b) for a, b in combinations(weights, 2)), default=0.0),
        metrics_missing=sum(counts[step] == 0 for step in range(steps)),
        metrics_doubled=sum(count > 1 for count in counts.values()),
        fixed=len(references) == 1,
    )


def facts_of(name: str, disturbances: Sequence[Disturbance], findings: Findings) -> dict[str, Any]:
    """The head of a scenario's report: machine, bounds and verdict."""
    audit = findings.audit
    wall = sum(audit.seconds.values())
    recovered = [recovery.seconds for recovery in audit.recoveries]
    return machine(
        "cpu",
        scenario=name,
        verdict="PASS" if findings.holds else "FAIL",
        disturbances=len(disturbances),
        attempts=audit.attempts,
        steps_committed=audit.committed,
        sequences_lost_steps=len(audit.lost),
        sequences_doubled_steps=len(audit.doubled),
        steps_out_of_order=len(audit.misordered),
        token_hash_mismatches=len(audit.changed) + findings.foreign,
        steps_redone=f"{audit.redone} (a checkpoint every {CHECKPOINT_EVERY} steps)",
        loss_deviation=f"{findings.loss_deviation:.2e}",
        weight_deviation=f"{findings.weight_deviation:.2e}",
        weight_deviation_of_undisturbed=f"{findings.undisturbed_deviation:.2e}",
        mlflow_steps_missing=findings.metrics_missing,
        mlflow_steps_doubled=findings.metrics_doubled,
        wall_seconds=round(wall),
        mean_seconds_between_disturbances=round(wall / max(1, len(disturbances)), 1),
        goodput=f"{goodput(audit.seconds):.1%}",
        goodput_at_one_disturbance_an_hour=f"{findings.hourly_goodput:.1%}",
        seconds_by_category={category: round(seconds, 1) for category, seconds in audit.seconds.items() if seconds},
        median_recovery_seconds=round(statistics.median(recovered), 1) if recovered else None,
    )


def disturbance_table(disturbances: Sequence[Disturbance]) -> list[dict[str, Any]]:
    """A row for each kind: how often, and how long until training went on."""
    rows = []
    for kind in dict.fromkeys(disturbance.kind for disturbance in disturbances):
        seconds = [one.recovered for one in disturbances if one.kind == kind]
        rows.append(
            {
                "disturbance": kind,
                "times": len(seconds),
                "median seconds to the next step": f"{statistics.median(seconds):.1f}",
                "longest": f"{max(seconds):.1f}",
            }
        )
    return rows


def _steps(folder: UPath) -> dict[int, StepRecord]:
    """What the ledger says of each step, the last time that it was trained."""
    return {line.step: line for _, line in read_ledger(folder) if isinstance(line, StepRecord)}


def _data(record: StepRecord) -> tuple[object, ...]:
    return record.first_position, record.sequences, record.token_hash, record.target_tokens


def _weights(folder: UPath) -> torch.Tensor:
    newest = checkpoints.newest(folder)
    assert newest is not None
    named = safetensors.load((newest / "adapter_model.safetensors").read_bytes())
    return torch.cat([named[name].flatten().double() for name in sorted(named)])


def _deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _metric_counts(uri: str, folder: UPath) -> Counter[int]:
    """How often MLflow has `train/loss` of each step."""
    run_id = read_json(folder / "run.json")["mlflow_run_id"]
    return Counter(point.step for point in MlflowClient(uri).get_metric_history(run_id, "train/loss"))
