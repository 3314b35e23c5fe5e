"""What a benchmark calls a pass."""

import pytest

from benchmarks import attention, checkpoint, logging_cost, loop, ray_overhead


@pytest.mark.parametrize(
    ("tokens", "full", "rolled", "verdict"),
    [
        (32768, 8.0, 1.0, "PASS"),  # eight times as fast, where ten were to be had
        (32768, 7.9, 1.0, "FAIL"),
        (8192, 2.0, 1.0, "PASS"),  # no bound over full attention below 16k tokens
        (8192, 8.0, 0.9, "FAIL"),  # rolling was faster
    ],
)
def test_of_attention(tokens: int, full: float, rolled: float, verdict: str) -> None:
    times = {name: [(seconds, seconds)] * 3 for name, seconds in {"ours": 1.0, "full": full, "rolled": rolled}.items()}
    assert attention.judge(times, 10.0, tokens)["verdict"] == verdict


def test_one_slow_round_decides_nothing() -> None:
    times = {"ours": [(1.0, 1.0), (9.0, 9.0), (1.0, 1.0)], "full": [(9.0, 9.0)] * 3, "rolled": [(2.0, 2.0)] * 3}
    assert attention.judge(times, 10.0, 32768)["time_gain"] == 9.0


@pytest.mark.parametrize(("bare", "verdict"), [(1.0, "PASS"), (0.98, "PASS"), (0.97, "FAIL")])
def test_of_the_loop(bare: float, verdict: str) -> None:
    rounds = [{"ours": 1.0, "bare": bare}] * 2 + [{"ours": 5.0, "bare": 1.0}]
    assert loop.judge(rounds) == (pytest.approx(1 / bare), verdict)


@pytest.mark.parametrize(("waited", "verdict"), [(0.02, "PASS"), (0.021, "FAIL")])
def test_of_logging(waited: float, verdict: str) -> None:
    rows = [{"seconds": 1.0, "waited": 0.0}, {"seconds": 1.0, "waited": waited}]
    assert logging_cost.judge(rows) == (pytest.approx(waited / 2), verdict)


@pytest.mark.parametrize(
    ("ray", "one", "verdicts"),
    [
        ([1.03, 1.03, 9.0], [1.86, 1.86, 1.86], ("PASS", "PASS")),  # a slow round decides nothing
        ([1.04, 1.04, 1.04], [1.8, 1.8, 1.8], ("FAIL", "FAIL")),
        ([1.0, 1.04, 1.06], [1.6, 1.84, 1.95], ("NOISE", "NOISE")),  # the rounds differ by more than is missed
    ],
)
def test_of_ray(ray: list[float], one: list[float], verdicts: tuple[str, str]) -> None:
    others = {name: {"step": 1.0, "others": 0.01} for name in ("torchrun", "apart", "alone")}
    rounds = [{"ray": {"step": r, "others": 0.09}, "one": {"step": o}} | others for r, o in zip(ray, one, strict=True)]
    judged = ray_overhead.judge(rounds, cores=2)
    assert (judged["verdict 1"], judged["verdict 2"]) == verdicts
    assert judged["cores that Ray's own processes take"] == 0.08
    assert judged["ratio to be expected of that"] == round(2 / 1.92, 3)
    assert ray_overhead.judge(rounds, cores=3)["ratio to be expected of that"] == 1


def test_contenders_with_other_losses_are_not_timed() -> None:
    torchrun = {"losses": [7.0, 6.0], "priority": 0}
    starts = {"torchrun": torchrun, "ray": torchrun, "alone": torchrun, "one": torchrun | {"losses": [7.0, 6.00003]}}
    assert ray_overhead.check_same(starts) == pytest.approx(5e-6)
    for other in ({"losses": [7.0, 6.0001]}, {"losses": [7.0, float("nan")]}, {"priority": 15}):
        with pytest.raises(SystemExit, match="ray"):
            ray_overhead.check_same(starts | {"ray": torchrun | other})


@pytest.mark.parametrize(
    ("blocked", "written", "plain", "verdict"),
    [
        (0.2, 1.02, 0.7, "PASS"),  # on each bound
        (0.21, 1.02, 0.7, "FAIL: blocked"),
        (0.2, 1.03, 0.69, "FAIL: bytes, rate"),
    ],
)
def test_of_the_checkpoint(blocked: float, written: float, plain: float, verdict: str) -> None:
    rounds = [{"copy": 0.1, "blocked": blocked, "write": 1.0, "plain": plain}] * 2
    slow = {"copy": 0.1, "blocked": 9.0, "write": 9.0, "plain": 0.1}
    assert checkpoint.judge([*rounds, slow], written)["verdict"] == verdict
