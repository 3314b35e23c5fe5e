"""The exact goals of `benchmarks/counts.py`, at the size of a 7B model and 100k tokens, and with grouped heads."""

import counts
import pytest

from longlora.segments import plan_segments

needs_counter = pytest.mark.skipif(
    not counts.COUNTS_ATTENTION,
    reason="this torch's FlopCounterMode does not count the CPU's attention operator (2.11)",
)


@needs_counter
@pytest.mark.parametrize("group_size", [2048, 8192])
@pytest.mark.parametrize("tokens", [32768, 102400])
def test_operations_are_those_of_the_formula(tokens: int, group_size: int) -> None:
    told = counts.operations(tokens, group_size)
    assert (told["of the formula"], told["of the code's own count"], told["verdict"]) == (1.0, 1.0, "PASS")


@pytest.mark.parametrize("group_size", [2048, 8192])
@pytest.mark.parametrize(("backend", "written"), [("flash", 0), ("cudnn", 4), ("sdpa", 4), ("varlen", 4)])
def test_bytes_beside_the_attention_calls(backend: str, written: int, group_size: int) -> None:
    """In activations: nothing with flash-attn, elsewhere the output and three gradients once."""
    plan = plan_segments([98304], group_size).to("meta")
    assert counts.moved(counts.contenders(plan, group_size)[backend], 98304) == written


@pytest.mark.parametrize(("backend", "written"), [("flash", 0), ("cudnn", 2.5), ("varlen", 2.5)])
def test_grouped_heads_move_less(backend: str, written: float) -> None:
    """32 query heads over 8 of keys and values: two tensors of full width and two of a quarter."""
    plan = plan_segments([102400], 8192).to("meta")
    assert counts.moved(counts.contenders(plan, 8192)[backend], 102400, kv_heads=8) == written


def test_what_others_move() -> None:
    """The copies of the published code, and of rolling: many times ours."""
    plan = plan_segments([98304], 8192).to("meta")
    others = {name: counts.moved(counts.contenders(plan, 8192)[name], 98304) for name in ("original", "rolled")}
    assert min(others.values()) > 10
