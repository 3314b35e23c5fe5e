"""A plan for people and programs: tables, JSON, the curve of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from longlora.memory import MARGIN
from longlora.roofline import ATTENTION_SHARE, MATRIX_SHARE
from pipeline.plan import GIB, HOUR, Plan, Preemptions

Prices = dict[str, float]
"""Per GPU-hour: `on_demand`, `spot`, those that are known."""


def plan_json(plan: Plan, prices: Prices, preemptions: Preemptions) -> dict[str, Any]:
    """Everything in the table, in the units of its keys; costs in the currency of the prices."""
    memory = plan.memory
    return {
        "gpu": plan.gpu.name,
        "workers": plan.workers,
        "context_length": plan.context,
        "parameters": plan.parameters,
        "trained": plan.trained,
        "fits": plan.fits,
        "reason": plan.reason,
        "policy": str(plan.policy) if plan.policy else None,
        "memory_gib": {
            "weights": memory.weights / GIB,
            "optimizer": memory.optimizer / GIB,
            "gradients": memory.gradients / GIB,
            "activations": memory.activations / GIB,
            "total": memory.total / GIB,
            "available": plan.gpu.usable_gib,
        },
        "longest_context": plan.longest_context,
        "largest_micro_batch": plan.largest_micro_batch,
        "step_seconds": plan.step_s,
        "tokens_per_second": plan.tokens_per_second,
        "steps": plan.steps,
        "hours": plan.seconds / HOUR,
        "hours_with_preemptions": _finite(plan.seconds_with(preemptions) / HOUR),
        "checkpoint_gib": plan.checkpoint_bytes / GIB,
        "checkpoint_every_steps": plan.checkpoint_steps,
        "checkpoint_best_steps": plan.best_checkpoint_steps(preemptions),
        "cost": _costs(plan, prices, preemptions),
    }


def plan_line(plan: Plan) -> str:
    """What matters before a run starts."""
    if not plan.fits:
        return f"{plan.gpu.name}: does not fit, {plan.reason}"
    return (
        f"{plan.gpu.name}: {plan.memory.total / GIB:.1f} of {plan.gpu.usable_gib:.1f} GiB, about "
        f"{plan.tokens_per_second:,.0f} tokens/s on {plan.workers} GPUs, {_time(plan.seconds)} ({plan.policy})"
    )


def plan_table(plan: Plan, prices: Prices, preemptions: Preemptions) -> Table:
    """What fits, how long, how much; with what the figures rest on."""
    memory = plan.memory
    table = Table(title=f"{plan.workers} × {plan.gpu.name} ({plan.gpu.source})", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    rows = {
        "model": f"{plan.parameters:,} parameters, {plan.trained:,} trained",
        "memory a GPU": f"{memory.total / GIB:.1f} of {plan.gpu.usable_gib:.1f} GiB ({MARGIN:.0%} of the free stay so)",
        "· weights": f"{memory.weights / GIB:.1f} GiB",
        "· masters, moments": f"{memory.optimizer / GIB:.1f} GiB",
        "· gradients": f"{memory.gradients / GIB:.1f} GiB",
        "· activations": f"{memory.activations / GIB:.1f} GiB",
        "activations": str(plan.policy) if plan.policy else f"does not fit: {plan.reason}",
        "longest context": f"{plan.longest_context:,} tokens",
        "largest micro-batch": f"{plan.largest_micro_batch} at {plan.context:,} tokens",
        "step": f"{plan.tokens_a_step:,} tokens in {_time(plan.step_s)}: {plan.tokens_per_second:,.0f} tokens/s",
        "run": f"{plan.steps:,} steps, {_time(plan.seconds)}",
        f"· {preemptions.per_hour:g} losses a machine and hour": _time(plan.seconds_with(preemptions)),
        "checkpoint": f"{plan.checkpoint_bytes / GIB:.2f} GiB every {plan.checkpoint_steps} steps "
        f"({_time(plan.checkpoint_steps * plan.step_s)}); {plan.best_checkpoint_steps(preemptions)} would waste least",
    }
    costs = _costs(plan, prices, preemptions)
    rows |= {f"cost, {name.replace('_', '-')}": f"{cost:,.2f}" for name, cost in costs.items()}
    for row in rows.items():
        table.add_row(*row)
    table.caption = (
        f"roofline: products at {MATRIX_SHARE:.0%} and attention at {ATTENTION_SHARE:.0%} of the rate, activations at "
        "the bandwidth; without communication. docs/performance.md compares it with measurements"
    )
    return table


def sweep_table(key: str, plans: Sequence[tuple[Any, Plan]], prices: Prices, preemptions: Preemptions) -> Table:
    """One row for each value of the key."""
    table = Table(title=f"{plans[0][1].workers} × {plans[0][1].gpu.name}")
    costs = [_costs(plan, prices, preemptions) for _, plan in plans]
    for name in (key, "GiB", "kept", "tokens/s", "step", "run", *(f"cost {n}" for n in costs[0])):
        table.add_column(name, justify="left" if name == "kept" else "right")
    for (value, plan), cost in zip(plans, costs, strict=True):
        table.add_row(
            f"{value:,}" if isinstance(value, int) else str(value),
            f"{plan.memory.total / GIB:.1f}",
            _short(plan),
            f"{plan.tokens_per_second:,.0f}",
            _time(plan.step_s),
            _time(plan.seconds),
            *(f"{amount:,.0f}" for amount in cost.values()),
        )
    return table


def draw_sweep(key: str, plans: Sequence[tuple[Any, Plan]], path: Path) -> None:
    """Throughput and memory over the values; those that do not fit are hollow."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    labels = [str(value) for value, _ in plans]
    curves = [
        ("tokens/s", [plan.tokens_per_second for _, plan in plans]),
        ("GiB a GPU", [plan.memory.total / GIB for _, plan in plans]),
    ]
    for number, (name, values) in enumerate(curves, start=1):
        axes = figure.add_subplot(1, 2, number)
        axes.plot(labels, values, color="tab:blue")
        for label, value, (_, plan) in zip(labels, values, plans, strict=True):
            axes.plot(label, value, "o", color="tab:blue", fillstyle="full" if plan.fits else "none")
        if number == 2:
            axes.axhline(plans[0][1].gpu.usable_gib, color="tab:red", linestyle="--", label="available")
            axes.legend()
        axes.set(xlabel=key, ylabel=name, ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.suptitle(f"{plans[0][1].workers} × {plans[0][1].gpu.name}")
    figure.savefig(path, dpi=120)


def _short(plan: Plan) -> str:
    if plan.policy is None:
        return "does not fit"
    policy = plan.policy
    parts = [f"{policy.kept} layers"] + [f"attention of {policy.kept_attention}"] * bool(policy.kept_attention)
    return ", ".join(parts + ["MLP in pieces"] * bool(policy.mlp_tile) + ["host memory"] * policy.offload)


def _costs(plan: Plan, prices: Prices, preemptions: Preemptions) -> dict[str, float]:
    """Of the whole run; only spot machines are taken away."""
    return {name: plan.cost(price, preemptions if name == "spot" else None) for name, price in prices.items()}


def _finite(number: float) -> float | None:
    """JSON has no infinity."""
    return number if number < float("inf") else None


def _time(seconds: float) -> str:
    """1.4 s, 12 min, 5.2 h."""
    if seconds == float("inf"):
        return "no end: each loss costs more than what lies between two"
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / HOUR:.1f} h"
