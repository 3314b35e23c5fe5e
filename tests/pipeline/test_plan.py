"""What a run would take, from its config alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from longlora.activations import ActivationPolicy
from longlora.memory import MARGIN
from longlora.roofline import Rates
from pipeline import capacity, gpus, main
from pipeline.config import Config, ConfigError, parse_config
from pipeline.gpus import Gpu
from pipeline.plan import GIB, Plan, Preemptions, make_plan
from pipeline.plan_report import plan_json

LLAMA2_7B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
LLAMA2_7B |= {"num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096}


def config_of(**sections: dict[str, object]) -> Config:
    values: dict[str, dict[str, object]] = {
        "run": {"name": "planned"},
        "model": {"architecture": LLAMA2_7B, "tokenizer": "nowhere"},
        "context": {"length": 32768},
        "attention": {"group_size": 8192},
        "data": {"train": ["nowhere"]},
        "optimization": {"steps": 1000, "global_batch": 64},
        "evaluation": {"lengths": [4096]},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return parse_config(values)


@pytest.fixture(scope="module")
def counted() -> dict[str, object]:
    """Shared: what is counted on the model does not depend on the rest."""
    return {}


@pytest.fixture
def plan_of(counted: dict[str, object]):
    def make(gpu: str = "h200", workers: int = 1, **sections: dict[str, object]) -> Plan:
        return make_plan(config_of(**sections), gpus.GPUS[gpu], workers, counted)

    return make


def test_memory_by_part(plan_of) -> None:
    """7B in bf16: 2 bytes a weight; 12 a trained one for the optimizer, over the workers; 2 + 4 for its gradient.

    The 4, a sum in fp32, is each worker's share where it has one micro-batch, and whole where it adds up several.
    """
    plan = plan_of(workers=4)
    assert plan.memory.weights == 2 * plan.parameters
    assert plan.memory.optimizer == 12 * plan.trained / 4
    assert plan.memory.gradients == plan.trained * (2 + 4)
    alone = plan_of(workers=4, optimization={"global_batch": 4})
    assert alone.memory.gradients == plan.trained * (2 + 4 / 4)
    assert plan.parameters - plan.trained == pytest.approx(6.74e9, rel=0.01)
    assert plan.trained == 32000 * 4096 + 65 * 4096 + 32 * 4 * 2 * 8 * 4096
    static = plan.memory.weights + plan.memory.optimizer
    free = (plan.gpu.usable_gib * GIB - static) * (1 - MARGIN) - plan.memory.gradients
    assert plan.policy == ActivationPolicy(32)
    assert plan.memory.activations <= free


def test_zero_3_shares_the_weights_and_recomputes(counted: dict[str, object]) -> None:
    plan = make_plan(config_of(workers={"zero_stage": 3}), gpus.GPUS["h200"], 4, counted)
    assert plan.memory.weights == 2 * plan.parameters / 4
    assert plan.policy == ActivationPolicy(0)


def test_zero_3_says_no_context_that_it_then_refuses(counted: dict[str, object]) -> None:
    plan = make_plan(config_of(workers={"zero_stage": 3}), gpus.GPUS["h100"], 4, counted)
    longest = config_of(workers={"zero_stage": 3}, context={"length": plan.longest_context})
    assert make_plan(longest, gpus.GPUS["h100"], 4, counted).fits


def test_what_does_not_fit_says_so(plan_of) -> None:
    assert plan_of("a10g").policy.offload, "24 GB hold a row of 32k tokens with its layer inputs in host memory"
    plan = plan_of("a10g", optimization={"micro_batch": 8})
    assert not plan.fits
    assert plan.reason.startswith("262,144 tokens need ")
    assert "\n" not in plan.reason
    kept = plan_of("h100", model={"activations": "keep"})
    assert not kept.fits and "model.activations = keep" in kept.reason


def test_the_longest_context_fits_and_one_more_does_not(plan_of) -> None:
    plan = plan_of("h100")
    assert plan.longest_context > 100_000
    assert plan_of("h100", context={"length": plan.longest_context}).fits
    longer = plan_of("h100", context={"length": plan.longest_context + 1024})
    assert longer.policy is None or longer.policy.offload
    assert plan.largest_micro_batch == plan.longest_context // 32768


def test_time_and_money(plan_of) -> None:
    plan = replace(plan_of(workers=2), step_s=10.0, checkpoint_steps=60)
    assert plan.seconds == 10_000
    assert plan.tokens_per_second == 64 * 32768 / 10
    assert plan.cost(3.6) == pytest.approx(3.6 * 2 * 10_000 / 3600)
    # Two machines, each lost once in 10 hours: a loss each 18,000 s costs 120 s and half of 600 s.
    preemptions = Preemptions(per_hour=0.1, recovery_s=120)
    assert plan.seconds_with(preemptions) == pytest.approx(10_000 / (1 - 420 / 18_000))
    assert plan.cost(3.6, preemptions) > plan.cost(3.6)
    assert plan.seconds_with(Preemptions(per_hour=10)) == float("inf")
    assert plan_json(plan, {}, Preemptions(10))["hours_with_preemptions"] is None
    # Both workers on one machine: half the losses.
    together = Preemptions(per_hour=0.1, recovery_s=120, gpus_per_machine=2)
    assert plan.seconds_with(together) == pytest.approx(10_000 / (1 - 420 / 36_000))


def test_the_best_checkpoint_interval_wastes_least(plan_of) -> None:
    plan, preemptions = replace(plan_of(workers=2), step_s=1.0, checkpoint_bytes=2 * 10**10), Preemptions(per_hour=0.1)
    # A save holds up 1 s (10 GB a worker at 10 GB/s); a loss each 18,000 s.
    best = plan.best_checkpoint_steps(preemptions)
    assert best == round((2 * 1.0 * 18_000) ** 0.5) == 190

    def wasted(steps: int) -> float:
        return 1.0 / steps + steps / 2 / 18_000  # saves, and what a loss undoes, in seconds per second

    assert wasted(best) < min(wasted(best // 2), wasted(2 * best))
    assert replace(plan, step_s=1000.0).best_checkpoint_steps(preemptions) == 1
    assert plan.best_checkpoint_steps(Preemptions(0.0)) == plan.steps


def test_more_workers_take_less_time_until_each_has_one_row(plan_of) -> None:
    seconds = [plan_of(workers=workers).step_s for workers in (1, 2, 64, 128)]
    assert seconds[0] == pytest.approx(2 * seconds[1], rel=0.01)
    assert seconds[2] == pytest.approx(seconds[3], rel=0.01)


def test_the_command_prints_json(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert main.main(["plan", "--gpu", "l40s", "--json", "--price", "1.5"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] and told["gpu"] == "l40s"
    assert told["cost"]["on_demand"] == pytest.approx(1.5 * told["workers"] * told["hours"])
    assert sum(told["memory_gib"][part] for part in ("weights", "optimizer", "gradients", "activations")) == (
        pytest.approx(told["memory_gib"]["total"])
    )


def test_a_sweep_draws_its_curve(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    picture = tmp_path / "curve.png"
    arguments = ["plan", "--sweep", "context.length=2k,4k", "--plot", str(picture), "evaluation.lengths=[512,4096]"]
    assert main.main(arguments) == 0
    out = capsys.readouterr().out
    assert "2,048" in out and "4,096" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--gpu", "b99"], "error: --gpu b99: is not known; known are h200, h100"),
        (["--sweep", "context.length"], "error: --sweep context.length: give a key and its values"),
        (["--sweep", "context.lenght=8k"], "error: context.lenght: unknown key; did you mean context.length?"),
        (["--workers", "0"], "error: --workers 0: it must be at least 1"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], reason: str, capsys: pytest.CaptureFixture) -> None:
    assert main.main(["plan", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(reason)


def test_a_run_that_does_not_fit_the_cluster_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, make_run: Callable
) -> None:
    """Before workers start. A machine with a GPU is played: Ray tells its type as a resource."""
    tiny_config, _ = make_run()
    nodes = [{"CPU": 8.0, "GPU": 1.0, "accelerator_type:H100": 1.0}]
    monkeypatch.setattr(capacity, "_nodes", lambda: nodes)
    monkeypatch.setattr(capacity, "uses_gpu", lambda config: True)
    capacity.check_memory(tiny_config)
    assert capsys.readouterr().out.startswith("plan: h100: ")
    small = Gpu("h100", 1.5, 1e12, Rates(1e12, 1e12), "for the test")
    monkeypatch.setitem(gpus.GPUS, "h100", small)
    with pytest.raises(ConfigError, match=r"^h100: [\d,]+ tokens need .* GiB are free: shorten context.length"):
        capacity.check_memory(tiny_config)
    nodes[0] = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:TPU": 1.0}
    capacity.check_memory(tiny_config)  # nothing is known of it: the workers will see
