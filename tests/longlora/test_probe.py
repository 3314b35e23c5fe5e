"""Costs from a short row against what a long one takes, counted byte by byte."""

import pytest
import torch

from longlora.activations import ActivationPolicy
from longlora.live_bytes import LiveBytes
from longlora.memory import MARGIN, required
from longlora.model import LongContextModel, build_base, training_model
from longlora.probe import auto_policy, free_bytes, head_cost, probe
from longlora.segments import plan_segments

LORA = {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": "auto", "rslora": False, "dora": False}
LORA |= {"train_embeddings": True, "train_norms": True}
SHAPES = {
    "llama": {"intermediate_size": 344, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 344, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    "gpt_neox": {"intermediate_size": 512, "hidden_dropout": 0.0, "attention_dropout": 0.0},
}
TOKENS = 1024


def model_of(family: str, device: str = "cpu", **shapes: object) -> LongContextModel:
    config = {"model_type": family, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config |= {"vocab_size": 512, "max_position_embeddings": TOKENS} | SHAPES[family] | shapes
    base = build_base(
        None, config, dtype=torch.float32, rope=None, context_length=TOKENS, init_seed=0, device=device
    )  # fmt: skip
    return training_model(base, LORA)


def counted(model: LongContextModel, policy: ActivationPolicy, tokens: int, device: str) -> int:
    """Bytes at the peak of forward and backward, without the gradients of parameters."""
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    positions = torch.arange(tokens, device=device)[None]
    plan = plan_segments([tokens], 256).to(device)
    model.follow(policy)
    with LiveBytes() as live:
        hidden = model.hidden_states(ids, positions, plan)
        loss = torch.nn.functional.linear(hidden, torch.ones(1, hidden.shape[-1], device=device)).sum()
        first_norm = next(p for p in model.parameters() if p.requires_grad)
        torch.autograd.grad(loss, first_norm)
    return live.peak


@pytest.mark.parametrize(
    "policy",
    [ActivationPolicy(4), ActivationPolicy(0), ActivationPolicy(0, 4), ActivationPolicy(2, 1)],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("family", SHAPES)
def test_a_short_row_predicts_a_long_one(family: str, device: str, policy: ActivationPolicy) -> None:
    """Within a tenth."""
    model = model_of(family, device)
    costs = probe(model, 256)
    assert counted(model, policy, TOKENS, device) == pytest.approx(costs.peak(policy, TOKENS), rel=0.1)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_frozen_layer_keeps_what_gradients_need_and_no_more(fuse: bool) -> None:
    """Bytes a token of a Llama-2-7B layer against the budget: at most 1.1.

    Budget, in bf16: inputs of both norms, the normed input of the projections, q, k, v, the attention output with its
    log-sum-exp, gate and up. The model's own operators also keep fp32 copies and products of norms and of the MLP.
    """
    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 32}
    config |= {"intermediate_size": 11008, "vocab_size": 512, "max_position_embeddings": 512}
    settings = {"dtype": torch.bfloat16, "rope": None, "context_length": 512, "init_seed": 0, "device": "meta"}
    model = training_model(build_base(None, config, fuse=fuse, **settings), LORA, fuse=fuse)
    budget = 2 * (2 * 4096 + 4096 + 3 * 4096 + 4096 + 2 * 11008) + 4 * 32
    own_norms = 2 * (4 + 4 + 2) * 4096  # fp32 input and product, normed bf16: of each norm, beside what the budget has
    own_mlp = 2 * 11008  # silu(gate)
    allowed = budget if fuse else budget + own_norms + own_mlp
    assert probe(model, 256).everything / allowed <= 1.10


def test_an_mlp_that_trains_is_not_counted_in_pieces() -> None:
    assert probe(model_of("llama"), 256).mlp > 0
    base = model_of("llama").causal_lm
    assert probe(training_model(base, None), 256).mlp == 0


def test_auto_keeps_everything_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    plan = plan_segments([TOKENS], 256)
    before = model.policy
    costs, head = probe(model, 256), head_cost(model, TOKENS, False)
    assert auto_policy(model, plan, costs) == ActivationPolicy(4)
    assert model.policy == before, "the probe leaves the policy as it was"
    enough_for_two = required(costs, ActivationPolicy(2), TOKENS, head) / (1 - MARGIN)
    monkeypatch.setattr("longlora.probe.free_bytes", lambda device: enough_for_two + 5000)
    assert auto_policy(model, plan, costs, reserved=1000).kept == 2
    monkeypatch.setattr("longlora.probe.free_bytes", lambda device: 1000.0)
    with pytest.raises(ValueError, match=r"^1,024 tokens need 0\.0 GiB of activations even if every layer") as caught:
        auto_policy(model, plan, costs)
    assert "\n" not in str(caught.value)


def test_the_hosts_memory_is_shared_by_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = free_bytes(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(torch.device("cpu")) == pytest.approx(alone / 4, rel=0.2)


def test_what_stands_around_the_layers() -> None:
    """In fp32: input, normed input and output of the last norm and its inverse root mean square; cos and sin; ids."""
    model = model_of("llama")
    config = model.causal_lm.config
    hidden, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    assert probe(model, 256).around == 4 * (3 * hidden + 1) + 4 * 2 * head_dim + 8
