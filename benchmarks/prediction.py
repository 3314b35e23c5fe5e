"""How well does `plan` foresee a step? Memory and time from shapes alone, against what was measured on a GPU.

    python benchmarks/prediction.py --save        # half a minute, on any machine

Of every row that the newest results of `benchmarks/step.py` have of S²-Attn on an H200 or H100: one row of one
document, all recomputed, or kept as ``auto`` chose. Predicted on the meta device by the memory model and the roofline
of `plan`, for the policy and the optimizer of the measured step: peak memory from a probe, seconds (the optimizer's not
among them) from the rates of `pipeline/gpus.py`. The roofline's shares were fitted to the H200's rows.

Goals: memory within 10 %, time within 10 %. `tests/longlora/test_against_gpus.py` holds both, memory to 3 %.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from figures import RESULTS, as_table, machine, save
from step import LORA, MODELS

from longlora.activations import ActivationPolicy
from longlora.memory import MLP_TILE, ActivationCosts, head_bytes, required
from longlora.model import LongContextModel, build_base, training_model
from longlora.probe import probe
from longlora.roofline import Recomputation, recomputation, step_seconds
from longlora.segments import plan_segments
from pipeline.gpus import Gpu, gpu_of_torch

GOAL = 0.10
GROUP_SIZE = 8192
NAMES = ("llama2-7b", "policies", "recomputation", "host", "longest", "llama3-8b", "h100")


@dataclass(frozen=True)
class Prediction:
    """One measured row, and what shapes alone say of it."""

    result: str
    gpu: Gpu
    model: str
    row: dict[str, Any]

    @property
    def policy(self) -> ActivationPolicy:
        """The policy that says so of itself."""
        policies = (
            ActivationPolicy(kept, attention, mlp_tile=tile)
            for kept in range(33)
            for attention in range(33 - kept)
            for tile in (None, MLP_TILE)
        )
        return next(policy for policy in policies if str(policy) == self.row["policy"])

    @property
    def gib(self) -> float:
        """Weights; masters, both moments and a gradient of what trains; activations at their peak."""
        model, costs, _ = counted(self.model)
        config = model.causal_lm.config
        static = sum(p.numel() * (p.element_size() + 14 * p.requires_grad) for p in model.parameters())
        head = head_bytes(config.vocab_size, config.hidden_size, self.row["tokens"], fused=True)
        return (static + required(costs, self.policy, self.row["tokens"], head)) / 2**30

    @property
    def seconds(self) -> float:
        model, costs, again = counted(self.model)
        plan = plan_segments([self.row["tokens"]], self.row["group_size"])
        return step_seconds(model, plan, self.policy, costs, again, self.gpu.rates)


@cache
def counted(name: str) -> tuple[LongContextModel, ActivationCosts, Recomputation]:
    settings = {"dtype": torch.bfloat16, "rope": None, "context_length": 512, "init_seed": 0, "device": "meta"}
    base = build_base(None, MODELS[name] | {"max_position_embeddings": 512}, fuse=True, **settings)
    model = training_model(base, LORA | {"train_embeddings": True, "train_norms": True}, fuse=True)
    return model, probe(model, GROUP_SIZE), recomputation(model)


def predictions() -> Iterator[Prediction]:
    """Of the rows that follow a policy and attend by S²-Attn."""
    for name in NAMES:
        measured = json.loads(sorted(RESULTS.glob(f"*-step-{name}.json"))[-1].read_text(encoding="utf-8"))
        gpu = gpu_of_torch(measured["processor"])
        assert gpu is not None, measured["processor"]
        for row in measured["rows"]:
            if row["contender"] in ("recompute", "auto") and "seconds" in row:
                yield Prediction(name, gpu, measured["model"], row)


def compare(prediction: Prediction) -> dict[str, Any]:
    row = prediction.row
    memory, time = prediction.gib / row["peak GiB"], prediction.seconds / row["seconds"]
    within = abs(memory - 1) <= GOAL and abs(time - 1) <= GOAL
    return {
        "result": f"step-{prediction.result}",
        "GPU": prediction.gpu.name,
        "tokens": row["tokens"],
        "policy": row["policy"],
        "GiB": row["peak GiB"],
        "GiB predicted": f"{prediction.gib:.1f}",
        "memory ratio": f"{memory:.3f}",
        "seconds": row["seconds"],
        "seconds predicted": f"{prediction.seconds:.2f}",
        "time ratio": f"{time:.3f}",
        "verdict": "PASS" if within else "FAIL",
    }


def main() -> int:
    """0 if every row is within the goals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-prediction.json and .md")
    options = parser.parse_args()
    found = list(predictions())
    rows = [compare(prediction) for prediction in found]
    kept = {name: counted(name)[1].everything for name in sorted({prediction.model for prediction in found})}
    print(as_table(rows), f"bytes that a layer keeps of a token: {kept}", sep="\n")
    if options.save:
        measured = "on an H200 and an H100, see the results named"
        facts = machine("cpu", measured=measured, goal=GOAL, bytes_that_a_layer_keeps_of_a_token=kept)
        print(f"written to {save('prediction', 'Memory and time of a step, predicted and measured', facts, rows)}")
    return 1 if any(row["verdict"] == "FAIL" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
