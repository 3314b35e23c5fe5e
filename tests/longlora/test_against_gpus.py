"""Predictions from shapes alone, on the meta device, against what `benchmarks/step.py` measured on GPUs."""

import pytest

from benchmarks.prediction import Prediction, predictions

ROWS = [pytest.param(p, id=f"{p.result}-{p.row['contender']}-{p.row['tokens']}") for p in predictions()]


@pytest.mark.parametrize("prediction", ROWS)
def test_peak_memory(prediction: Prediction) -> None:
    """Within 3 %; `auto` leaves 5 % of the memory alone."""
    assert prediction.gib == pytest.approx(prediction.row["peak GiB"], rel=0.03)


@pytest.mark.parametrize("prediction", ROWS)
def test_seconds_a_step(prediction: Prediction) -> None:
    """Within a tenth."""
    assert prediction.seconds == pytest.approx(prediction.row["seconds"], rel=0.1)
