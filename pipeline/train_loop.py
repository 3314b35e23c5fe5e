"""What each worker runs: the visible loop, and what a step, a validation and a checkpoint are."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
import torch
import torch.distributed as dist
from upath import UPath

from longlora.segments import plan_segments
from pipeline import checkpoints
from pipeline.activation_policy import agreed_policy, fusion_told, may_fuse
from pipeline.assignment import Assignment, CheckpointRequest
from pipeline.checkpoint_writer import CheckpointWriter
from pipeline.checkpoints import RunState
from pipeline.config import Config, parse_config
from pipeline.engine import TrainingEngine, partitioned_loading
from pipeline.feed import Feed, MicroBatch, collate
from pipeline.ledger import StepRecord, token_hash
from pipeline.meter import Meter, peak_rate
from pipeline.models import build_model
from pipeline.optimizer import build_optimizer, learning_rate
from pipeline.order import positions_of_step, sequences_at, share
from pipeline.packs import Packs
from pipeline.profile_steps import StepProfiler
from pipeline.system_metrics import sampling
from pipeline.trained import Part, Trained, combine

HOLD_S = 60.0
"""How long workers wait to be stopped after a checkpoint that announced it, before they go on."""


def train_loop(assignment: Assignment) -> None:
    """Trains from the newest checkpoint to the last step."""
    run = Worker(assignment)
    step = run.restore()
    try:
        with sampling(assignment.run_log, run.attempt):
            train_from(step, run)
    except Exception:
        # Also of a rank that lost its peer: a resize must not wait for a checkpoint that nobody makes any more.
        assignment.run_log.workers_ended.remote(run.attempt)
        raise


def train_from(step: int, run: "Worker") -> None:
    """The loop: step, validation, checkpoint."""
    config = run.config
    while step < config.optimization.steps:
        record = run.train_step(step)
        step += 1
        run.tell("step", run.attempt, record)
        run.profiler.step()
        if run.is_due(config.evaluation.every_steps, step):
            run.evaluate(step)
        end = run.asked.end
        if run.is_due(config.checkpoint.every_steps, step) or run.asked.number or end:
            run.save(step)
        if end:
            break
    run.close()


def group_size_at(step: int, config: Config) -> int | None:
    """Group size of step `step`: the config's, or None (full attention) in the last `full_last` of the steps."""
    full_steps = round(config.attention.full_last * config.optimization.steps)
    return None if step >= config.optimization.steps - full_steps else config.attention.group_size


class Worker:
    """One rank of a run: model, engine, feed, and what it tells the run's log (rank 0 only)."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.config = config = parse_config(assignment.config)
        self.folder = UPath(assignment.run_folder)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        torch.set_num_threads(max(1, int(config.workers.cpus)))
        torch.use_deterministic_algorithms(config.run.deterministic)
        torch.manual_seed(config.run.seed)
        # Held until the engine has the model: transformers looks for it while it loads.
        partitioning = partitioned_loading(config)
        model = build_model(config, fuse=may_fuse(config))
        self.engine = TrainingEngine(model, build_optimizer(model, config), config)
        del partitioning
        self.network = self.engine.model.network
        row = plan_segments([config.context.length], config.attention.group_size)
        self.engine.model.follow(agreed_policy(config, self.engine.model))
        self.setup = {
            "attention": str(self.engine.model.backend_choice(self.engine.device, row)),
            "activations": str(self.engine.model.policy),
            "fused": fusion_told(config, self.engine.model),
        }
        self.meter = Meter(self.engine.model, self.engine.device)
        self.packs = Packs.open(UPath(assignment.train_packs))
        self.feed = Feed(
            self.packs,
            config.run.seed,
            config.optimization.global_batch,
            config.optimization.micro_batch,
            self.world_size,
            self.rank,
            self.row_cost,
        )
        self.validation = self._validation_rows()
        self.writer = CheckpointWriter(
            self.folder, self.network, assignment.run_log, config.checkpoint, self.rank, self.world_size
        )
        self.attempt = 0
        self.asked = CheckpointRequest()
        self.eval_loss: tuple[int, float] | None = None

    def row_cost(self, step: int, document_lengths: Sequence[int]) -> float:
        """Operations of a row in step `step`."""
        return self.meter.row_operations(document_lengths, group_size_at(step, self.config))

    def restore(self) -> int:
        """Takes over the newest checkpoint that verifies; returns the step to go on from."""
        chosen: list[Any] = [None, []]
        if self.rank == 0:
            newest = checkpoints.newest(self.folder)
            chosen = [newest, checkpoints.discard_uncommitted(self.folder, newest)]
        dist.broadcast_object_list(chosen)
        (folder, discarded), step = chosen, 0
        if folder is not None:
            state = checkpoints.read_state(folder)
            checkpoints.check_resumable(state, self.packs.fingerprint, self.assignment.base_fingerprint)
            self.engine.write_state(checkpoints.read_parameters(folder, self.network), state.step)
            step = state.step
        self.writer.reserve(self.engine.local_state())
        started = [0]
        if self.rank == 0:
            details = {
                "checkpoint": folder.name if folder else None,
                **self.setup,
                "peak_rate": peak_rate(self.engine.device),
                "discarded": discarded,
                "packs": self._packs_told(),
            }
            started = [ray.get(self.assignment.run_log.start_attempt.remote(self.world_size, step, details))]
        dist.broadcast_object_list(started)
        self.attempt = started[0]
        traced = self.config.run.profile if self.rank == 0 else 0
        self.profiler = StepProfiler(self.folder, self.attempt, traced, partial(self.tell, "say"))
        return step

    def train_step(self, step: int) -> StepRecord:
        """One optimizer step over the sequences of `step`, whatever this worker's share of them is."""
        config, start = self.config, time.perf_counter()
        self.writer.check()
        with self.meter.part("feed"):
            batches = self.feed.step(step)
        positions = positions_of_step(step, config.optimization.global_batch)
        sequences = sequences_at(positions, config.run.seed, self.packs.count)
        target_tokens = sum(self.packs.target_tokens(sequence) for sequence in sequences)
        group_size = group_size_at(step, config)
        with self.meter.part("gradients"):
            result = self.engine.accumulate(batches, group_size, target_tokens)
        with self.meter.part("agreement"):
            trained = self._gather(positions, batches, result.losses, group_size)
        rate = learning_rate(step, config.optimization)
        with self.meter.part("update"):
            self.engine.apply(rate)
            gradient_norm = self.engine.gradient_norm
        return StepRecord(
            step=step,
            world_size=self.world_size,
            first_position=positions.start,
            sequences=trained.sequences,
            token_hash=token_hash(trained.hashes),
            loss=trained.loss / target_tokens,
            target_tokens=target_tokens,
            time=time.time(),
            tokens=trained.tokens,
            seconds=time.perf_counter() - start,
            learning_rate=rate,
            gradient_norm=gradient_norm,
            operations=trained.operations,
            peak_bytes=trained.peak_bytes,
            parts=self.meter.parts(),
        )

    def evaluate(self, step: int) -> None:
        """Loss on the held-out rows with full attention inside each document, summed in row order."""
        start = time.perf_counter()
        losses = self.engine.evaluate(self.validation)
        per_rank: list[list[float]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(per_rank, losses)
        targets = sum(self.validation_targets)
        loss = sum(value for losses in per_rank for value in losses) / targets
        self.eval_loss = (step, loss)
        if self.rank == 0:
            self.assignment.run_log.evaluated.remote(step, loss, targets, time.perf_counter() - start)

    def save(self, step: int) -> None:
        """Begins a checkpoint of the state after `step` steps; one that was asked for is waited for.

        Workers that are about to be stopped wait for that as well.
        """
        measured_at, loss = self.eval_loss or (None, None)
        state = RunState(
            step=step,
            position=step * self.config.optimization.global_batch,
            packs_fingerprint=self.packs.fingerprint,
            base_fingerprint=self.assignment.base_fingerprint,
            training_hash=self.config.training_hash(),
            attempt=self.attempt,
            eval_loss=loss if measured_at == step else None,
        )
        asked, self.asked = self.asked, CheckpointRequest()
        self.writer.save(state, self.engine.local_state(), asked.number)
        if asked.number:
            self.writer.wait()
        if asked.hold:
            time.sleep(HOLD_S)

    def tell(self, what: str, *values: object) -> None:
        """Tells the run's log, without waiting; rank 0 speaks for all."""
        if self.rank == 0:
            getattr(self.assignment.run_log, what).remote(*values)

    def is_due(self, every_steps: int | None, step: int) -> bool:
        """Whether something that is done every so many steps, and after the last one, is done after `step` steps."""
        return every_steps is not None and (step % every_steps == 0 or step == self.config.optimization.steps)

    def close(self) -> None:
        self.profiler.close()
        self.writer.wait()  # first: who stops or resizes the run waits for workers that have not ended
        self.tell("workers_ended", self.attempt)
        self.feed.close()
        if self.rank == 0:
            ray.get(self.assignment.run_log.sync.remote(self.attempt))

    def _packs_told(self) -> dict[str, dict[str, Any]]:
        """What the ledger says of the packs, by their use."""
        told = {"training": self.packs.summary()}
        if self.assignment.validation_packs is not None:
            told["validation"] = Packs.open(UPath(self.assignment.validation_packs)).summary()
        return told

    def _validation_rows(self) -> list[MicroBatch]:
        """This rank's share of the first `evaluation.rows` held-out sequences, a row at a time."""
        self.validation_targets: list[int] = []
        if self.assignment.validation_packs is None or self.config.evaluation.every_steps is None:
            return []
        packs = Packs.open(UPath(self.assignment.validation_packs))
        count = min(self.config.evaluation.rows, packs.count)
        self.validation_targets = [packs.target_tokens(sequence) for sequence in range(count)]
        mine = share(count, self.world_size, self.rank)
        return [collate([packs.row(s)], [s], [s]) for s in mine]

    def _gather(
        self, positions: range, batches: list[MicroBatch], losses: list[float], group_size: int | None
    ) -> Trained:
        """What all ranks trained; all learn here whether a checkpoint is asked for, so that they save the same step."""
        request = ray.get(self.assignment.run_log.request.remote()) if self.rank == 0 else None
        part = Part(
            rows=[row for batch in batches for row in batch.row_identities()],
            losses=[(batch.positions[0], loss) for batch, loss in zip(batches, losses, strict=True)],
            tokens=sum(batch.input_ids.numel() for batch in batches),
            operations=self.meter.operations(batches, group_size),
            peak_bytes=self.meter.peak_bytes(),
        )
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, (part, request))
        self.asked = everyone[0][1]
        return combine([part for part, _ in everyone], positions)
