"""The DeepSpeed engine: one optimizer step over any number of micro-batches, and its state at any world size.

Gradients of a step are Σ over all token losses of all ranks ÷ target tokens of the whole step, so the result depends on
neither the number of workers nor how a step is cut into micro-batches. ZeRO averages gradients over ranks; the loss is
scaled by the world size to undo that.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from transformers.integrations import HfDeepSpeedConfig

from longlora.model import LongContextModel
from longlora.segments import plan_segments
from pipeline.config import Config
from pipeline.embedding_rows import TouchedRows, sparse_embedding
from pipeline.feed import MicroBatch
from pipeline.gradient_sums import GradientSums
from pipeline.optimizer import MOMENTS, Fragment, ParameterState, set_learning_rate

# None of the ops that DeepSpeed would compile is used. The one for CPUs is built at the first start, and ninja looks at
# it again at every later one, in a cache that the whole machine shares: another process that builds it anew stalls a
# run for minutes (docs/decisions.md, 30). gloo reduces gradients as well.
deepspeed.ops.__compatible_ops__ = {}

BUCKET = 500_000_000  # DeepSpeed's default


@dataclass(frozen=True)
class StepResult:
    """What this rank's share of a step gave: the summed loss of each micro-batch, in nats."""

    losses: list[float]


def deepspeed_config(config: Config, bucket: int = BUCKET) -> dict[str, Any]:
    """DeepSpeed's settings; optimizer and schedule are ours, so there is no block for them.

    bucket: elements of gradients that are reduced together, at most.
    """
    bf16 = config.model.dtype == "bfloat16"
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimization.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": config.workers.zero_stage,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
        },
    }


def partitioned_loading(config: Config) -> HfDeepSpeedConfig | None:
    """ZeRO-3: while the returned object lives, transformers gives each rank its share of every weight that it loads.

    Without it each rank would hold the whole base in host memory before DeepSpeed partitions it.
    """
    return HfDeepSpeedConfig(deepspeed_config(config)) if config.workers.zero_stage == 3 else None


class TrainingEngine:
    """A DeepSpeed engine around a LongContextModel, on this rank."""

    def __init__(self, model: LongContextModel, optimizer: torch.optim.Optimizer, config: Config) -> None:
        self.world_size = dist.get_world_size()
        self.zero_stage = config.workers.zero_stage
        self.seed = config.run.seed
        rows = sparse_embedding(model) if self.zero_stage == 2 and self.world_size > 1 else None
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            config=deepspeed_config(config, bucket=BUCKET if rows is None else min(BUCKET, rows.numel() - 1)),
            dist_init_required=False,
        )
        self.device = self.engine.device
        if rows is not None:
            TouchedRows(self.engine.optimizer, rows)
        self._create_moments()

    @property
    def model(self) -> LongContextModel:
        return self.engine.module

    def accumulate(self, batches: Sequence[MicroBatch], group_size: int | None, target_tokens: int) -> StepResult:
        """Forward and backward of this rank's micro-batches; gradients are reduced once, at the end.

        target_tokens: of the whole step, over all ranks. A rank may have fewer micro-batches than another (it is given
        fillers where collectives must match, see `fill`).
        """
        losses = []
        scale = self.world_size / target_tokens
        filled = self._fill(batches)
        sums = GradientSums((parameter for _, parameter in self.named_trainable()), len(filled))
        with self.engine.coalesce_grad_reduction():
            for batch in filled:
                self._seed_dropout(batch)
                loss = self._loss(batch, group_size)
                self.engine.backward(loss * scale, scale_wrt_gas=False)
                sums.add()
                losses.append(loss.detach())
        return StepResult([float(loss) for loss in losses[: len(batches)]])

    def apply(self, rate: float) -> None:
        """One optimizer step with the accumulated gradients; RuntimeError if DeepSpeed skipped it."""
        set_learning_rate(self.engine.optimizer.optimizer, rate)
        self.engine.step()
        if not self.engine.was_step_applied():
            raise RuntimeError("DeepSpeed skipped the update: the gradients overflowed")

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> list[float]:
        """Summed loss of each micro-batch with full attention inside each document, in nats."""
        self.engine.eval()
        losses = [float(self._loss(batch, None)) for batch in self._fill(batches)]
        self.engine.train()
        return losses[: len(batches)]

    @property
    def gradient_norm(self) -> float:
        """Norm of the last step's gradients before clipping."""
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def _loss(self, batch: MicroBatch, group_size: int | None) -> Tensor:
        batch = batch.to(self.device)
        plan = plan_segments(batch.document_lengths, group_size).to(self.device)
        return self.engine(
            input_ids=batch.input_ids, position_ids=batch.position_ids, targets=batch.targets, segment_plan=plan
        )

    def _seed_dropout(self, batch: MicroBatch) -> None:
        """Dropout depends on the run's seed and on what is trained, not on the worker or on what came before."""
        if batch.positions:
            torch.manual_seed(self.seed << 32 | batch.positions[0])

    def _fill(self, batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """Adds zero-weight micro-batches where all ranks must run as many: under ZeRO-3, and on a rank without any."""
        wanted = torch.tensor(max(1, len(batches)), device=self.device)
        if self.zero_stage == 3:
            dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
        return [*batches, *[filler()] * (int(wanted) - len(batches))]

    def named_trainable(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Trainable parameters by their names in the network (as transformers or PEFT call them), in a fixed order."""
        wanted = set(self.names)
        for name, parameter in self.model.named_parameters():
            if name in wanted:
                yield name.removeprefix("network."), parameter

    def local_state(self) -> Iterator[tuple[str, Fragment]]:
        """What this rank holds of the trainable parameters' state: views, which the next step changes."""
        for name, parameter in self.named_trainable():
            fragment = self._partition(parameter) if self.zero_stage == 3 else _slice(parameter)
            if fragment is not None:
                yield name, fragment

    def _partition(self, parameter: torch.nn.Parameter) -> Fragment | None:
        """ZeRO-3: this rank's part of the flat tensor, without what pads it."""
        size, numel = parameter.ds_tensor.numel(), parameter.ds_numel  # type: ignore[attr-defined]
        start = dist.get_rank() * size
        length = min(size, numel - start)
        if length <= 0:
            return None
        moments = (safe_get_local_optimizer_state(parameter, key) for key in MOMENTS)
        parts = (safe_get_local_fp32_param(parameter), *moments)
        return Fragment(start, ParameterState(*(part.detach().flatten()[:length] for part in parts)))

    def write_state(self, state: dict[str, ParameterState], adam_step: int) -> None:
        """Sets masters, moments, Adam's step and the low-precision parameters, at any world size.

        state: one ParameterState for each trainable parameter; ValueError names those that are missing or foreign.
        """
        named = dict(self.named_trainable())
        if state.keys() != named.keys():
            odd = sorted(state.keys() ^ named.keys())
            raise ValueError(
                f"the checkpoint holds other parameters than the model trains: {odd[0]} ({len(odd)} in all)"
            )
        for partition in self._flat_partitions():
            self.engine.optimizer.optimizer.state[partition]["step"].fill_(adam_step)
        for name, parameter in named.items():
            self._set_parameter(parameter, state[name])

    def _flat_partitions(self) -> list[Tensor]:
        """This rank's fp32 partitions, by which Adam's state is keyed."""
        zero = self.engine.optimizer
        return zero.fp32_partitioned_groups_flat if self.zero_stage == 3 else zero.single_partition_of_fp32_groups

    def _create_moments(self) -> None:
        """Creates Adam's state, and links it to the parameters, before the first step.

        DeepSpeed links it after the first *group* of the first step, when the other groups have none yet (stages 1
        and 2), so that their moments could not be read; and a restore needs the state to be there.
        """
        zero = self.engine.optimizer
        for partition in self._flat_partitions():
            zero.optimizer.state[partition] = {
                "step": torch.tensor(0.0),
                **{key: torch.zeros_like(partition) for key in MOMENTS},
            }
        if self.zero_stage != 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _set_parameter(self, parameter: torch.nn.Parameter, state: ParameterState) -> None:
        if self.zero_stage == 3:
            self._set_partition(parameter, state)
        else:
            safe_set_full_fp32_param(parameter, state.master.to(self.device))
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, getattr(state, key).to(self.device), key)
        gathered = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
        with gathered if self.zero_stage == 3 else nullcontext(), torch.no_grad():
            if self.zero_stage != 3 or dist.get_rank() == 0:
                parameter.copy_(state.master.to(parameter.device, parameter.dtype))

    def _set_partition(self, parameter: torch.nn.Parameter, state: ParameterState) -> None:
        """ZeRO-3: this rank's slice of the flat, zero-padded tensors (DeepSpeed's full setters do not pad)."""
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # this rank's partition, put there by ZeRO-3
        for key in (None, *MOMENTS):
            flat = getattr(state, key or "master").flatten()
            padded = torch.nn.functional.pad(flat, (0, size * self.world_size - flat.numel()))
            part = padded[dist.get_rank() * size :][:size].to(self.device)
            if key is None:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, key)


def _slice(parameter: torch.nn.Parameter) -> Fragment | None:
    """ZeRO-1 and 2: what of a parameter lies in this rank's flat partition, if anything does."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # put there by DeepSpeed
    if mapping is None:
        return None
    parts = (mapping.get_hp_fragment(key) for key in (None, *MOMENTS))
    return Fragment(mapping.lp_fragment_address.start, ParameterState(*(part.detach() for part in parts)))


def filler() -> MicroBatch:
    """A micro-batch without targets: it takes part in the collectives of a step and adds nothing to it."""
    return MicroBatch(
        input_ids=torch.zeros(1, 2, dtype=torch.int64),
        position_ids=torch.arange(2).unsqueeze(0),
        targets=torch.full((2,), -100),
        document_lengths=(2,),
        rows=(2,),
        sequences=(),
        positions=(),
        target_tokens=0,
    )
