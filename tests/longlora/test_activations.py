"""Every policy gives the same loss and gradients to the last bit; they differ in what is kept and what runs again."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longlora.activations import ActivationPolicy, layers_of
from longlora.model import LongContextModel, build_base, training_model
from longlora.segments import plan_segments

LENGTHS = [24, 5, 11]
LORA = {
    "rank": 4,
    "alpha": 8,
    "dropout": 0.0,
    "targets": "auto",
    "rslora": False,
    "dora": False,
    "train_embeddings": True,
    "train_norms": True,
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64}
FAMILIES = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "gpt_neox": {"intermediate_size": 48, "hidden_dropout": 0.0, "attention_dropout": 0.0},
}
POLICIES = [
    ActivationPolicy(kept=0),
    ActivationPolicy(kept=0, kept_attention=4),
    ActivationPolicy(kept=0, kept_attention=2, mlp_tile=7),
    ActivationPolicy(kept=1, kept_attention=2),
    ActivationPolicy(kept=2, mlp_tile=40),
    ActivationPolicy(kept=0, offload=True),
    ActivationPolicy(kept=4),
]
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def model_of(family: str = "llama", adapter: dict[str, object] | None = LORA) -> LongContextModel:
    config = {"model_type": family, "max_position_embeddings": 64} | SIZES | FAMILIES[family]
    base = build_base(None, config, dtype=torch.float32, rope=None, context_length=64, init_seed=0)
    torch.manual_seed(0)
    model = training_model(base, adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)  # B is zero at the start, and hides gradients of A
    return model


def row() -> dict[str, object]:
    ids = torch.arange(sum(LENGTHS)) * 7 % 64
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    targets = ids.roll(-1)
    return {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "targets": targets,
        "segment_plan": plan_segments(LENGTHS, 4),
    }


def loss_and_gradients(model: LongContextModel) -> list[torch.Tensor]:
    loss = model(**row())
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trainable)]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_changes_no_bit(family: str, policy: ActivationPolicy) -> None:
    model = model_of(family)
    wanted = loss_and_gradients(model)
    model.follow(policy)
    ours = loss_and_gradients(model)
    assert all(torch.equal(x, y) for x, y in zip(ours, wanted, strict=True)) or policy.mlp_tile
    torch.testing.assert_close(ours, wanted)  # pieces of other sizes multiply in another order


class Calls(TorchDispatchMode):
    """How often an operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_what_runs_again(policy: ActivationPolicy) -> None:
    """Attention of a layer runs again if the layer is recomputed and does not keep the output."""
    model = model_of()
    with Calls() as kept:
        model(**row()).backward()
    model.follow(policy)
    with Calls() as calls:
        model(**row()).backward()
    again = 4 - policy.kept - min(policy.kept_attention, 4 - policy.kept)
    per_layer = kept.count[str(ATTENTION)] // 4
    assert calls.count[str(ATTENTION)] == per_layer * (4 + again)


@pytest.mark.parametrize("tile", [None, 16])
def test_the_mlp_of_a_recomputed_layer_runs_twice_also_in_pieces(tile: int | None) -> None:
    model = model_of()
    model.follow(ActivationPolicy(kept=1, mlp_tile=tile))
    runs: Counter[int] = Counter()
    for number, layer in enumerate(layers_of(model)):
        layer.mlp.gate_proj.register_forward_hook(
            lambda module, inputs, output, number=number: runs.update({number: inputs[0].shape[1]})
        )
    model(**row()).backward()
    assert runs == {0: 80, 1: 80, 2: 80, 3: 40}


def saved_elements(model: LongContextModel) -> int:
    """Elements of the activations that the graph holds at the end of the forward pass, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**row())
    del loss
    return sum(storages.values())


def test_recomputed_layers_hold_their_input_alone() -> None:
    model = model_of()
    everything = saved_elements(model)
    model.follow(ActivationPolicy(kept=0))
    inputs = saved_elements(model)
    model.follow(ActivationPolicy(kept=3))
    one = saved_elements(model)
    tokens = sum(LENGTHS)
    assert inputs < everything / 4
    assert inputs - 4 * tokens * 32 < 6 * tokens * 32  # beside the inputs: the last norm, the head, cos and sin
    assert inputs < one < everything


def test_evaluation_keeps_and_recomputes_nothing() -> None:
    model = model_of()
    model.follow(ActivationPolicy(kept=0, kept_attention=4))
    with torch.no_grad():
        trained = model(**row())
    evaluated = model.eval()(**row())
    torch.testing.assert_close(trained, evaluated)


def test_an_mlp_that_trains_is_not_cut() -> None:
    model = model_of(adapter=LORA | {"targets": ["q_proj", "down_proj"]})
    with pytest.raises(ValueError, match="an MLP that trains cannot run in pieces"):
        model.follow(ActivationPolicy(kept=0, mlp_tile=8))
    model.follow(ActivationPolicy(kept=4, mlp_tile=8))


def test_a_policy_says_what_it_does() -> None:
    policy = ActivationPolicy(kept=6, kept_attention=26, mlp_tile=16384)
    wanted = "the last 6 layers keep all, 26 others their attention output, MLP in pieces of 16,384 tokens"
    assert str(policy) == wanted
    assert "host memory" in str(replace(policy, offload=True))
