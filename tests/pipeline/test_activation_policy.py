"""All workers follow one policy: the one that fits each of them."""

from typing import Any

import pytest
import torch.distributed as dist

from longlora.activations import ActivationPolicy
from longlora.model import LongContextModel
from pipeline import activation_policy
from pipeline.activation_policy import agreed_policy, fusion_told, probed_group_size
from pipeline.assignment import FinalError
from pipeline.config import Config
from pipeline.models import build_model


@pytest.fixture
def subject(make_run: Any) -> Any:
    def make(**model: str) -> tuple[Config, LongContextModel]:
        config, _ = make_run(model=model)
        return config, build_model(config)

    return make


def answers(monkeypatch: pytest.MonkeyPatch, others: list[Any]) -> None:
    """Other workers that answer so; this one's answer comes first."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1 + len(others))

    def all_gather_object(everyone: list[Any], mine: Any) -> None:
        everyone[:] = [mine, *others]

    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)


def test_what_the_config_fixes(subject: Any) -> None:
    assert agreed_policy(*subject(activations="keep")) == ActivationPolicy(2)
    assert agreed_policy(*subject(activations="recompute")) == ActivationPolicy(0)


@pytest.mark.parametrize(
    ("others", "agreed"),
    [
        ([], ActivationPolicy(2)),  # a host has room for two tiny layers
        ([ActivationPolicy(1, 1), ActivationPolicy(2)], ActivationPolicy(1, 1)),
        ([ActivationPolicy(1), ActivationPolicy(0, 2, mlp_tile=16384)], ActivationPolicy(0, 2, mlp_tile=16384)),
        ([ActivationPolicy(0, offload=True), ActivationPolicy(0)], ActivationPolicy(0, offload=True)),
    ],
)
def test_the_smallest_machine_decides(
    subject: Any, monkeypatch: pytest.MonkeyPatch, others: list[ActivationPolicy], agreed: ActivationPolicy
) -> None:
    answers(monkeypatch, others)
    assert agreed_policy(*subject(activations="auto")) == agreed


def test_a_worker_without_room_ends_the_run_on_all(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, ["1,024 tokens need 3.0 GiB"])
    with pytest.raises(FinalError, match=r"^1,024 tokens need 3\.0 GiB$"):
        agreed_policy(*subject(activations="auto"))
    monkeypatch.setattr("longlora.probe.free_bytes", lambda device: 10.0)
    answers(monkeypatch, [ActivationPolicy(2)])
    with pytest.raises(FinalError, match=r"shorten context\.length or optimization\.micro_batch"):
        agreed_policy(*subject(activations="auto"))


def test_what_is_fused_is_told(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fusion_told(*subject(fused="off")) == "off"
    config, model = subject()
    assert fusion_told(config, model) == "needs a CUDA device, not cpu"
    monkeypatch.setattr(activation_policy.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(activation_policy.fused, "refusal", lambda model_type, device: "liger-kernel is not installed")
    assert fusion_told(config, model) == "LoRA (liger-kernel is not installed)"
    monkeypatch.setattr(activation_policy.fused, "refusal", lambda model_type, device: None)
    assert fusion_told(config, model) == "norms, MLP, rotation, loss, LoRA"


@pytest.mark.parametrize(
    ("group_size", "full_last", "length", "probed"),
    [(64, 0.0, 256, 64), (64, 0.25, 256, None), (256, 0.0, 256, None), (None, 0.0, 256, None)],
)
def test_rows_that_are_ever_full_are_probed_so(
    make_run: Any, group_size: int | None, full_last: float, length: int, probed: int | None
) -> None:
    config, _ = make_run(attention={"group_size": group_size, "full_last": full_last}, context={"length": length})
    assert probed_group_size(config) == probed
