import pytest

from pipeline.optimizer import learning_rate
from pipeline.sections import Optimization


def settings(**values: object) -> Optimization:
    return Optimization.model_validate(
        {"steps": 10, "global_batch": 1, "learning_rate": 1.0, "warmup_steps": 2, **values}
    )


def test_constant_after_warm_up() -> None:
    assert [learning_rate(step, settings()) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_linear_ends_at_its_last_ratio() -> None:
    rates = [learning_rate(step, settings(schedule="linear", final_lr_ratio=0.2)) for step in range(10)]
    assert rates[1] == 1.0
    assert rates[2:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])


def test_cosine_is_half_way_in_the_middle_and_ends_at_its_last_ratio() -> None:
    cosine = settings(schedule="cosine", final_lr_ratio=0.2)
    assert learning_rate(5, cosine) == pytest.approx(0.6)
    assert learning_rate(9, cosine) == pytest.approx(0.2)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(0, settings(warmup_steps=0)) == 1.0
