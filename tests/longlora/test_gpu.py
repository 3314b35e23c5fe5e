"""Fused operators, host copies and the probe on a GPU, where there is one."""

import pytest
import torch

from longlora import fused
from longlora.activations import ActivationPolicy
from longlora.model import LongContextModel, build_base, training_model
from longlora.probe import probe
from longlora.segments import plan_segments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TOKENS = 1024
LORA = {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": "auto", "rslora": False, "dora": False}
LORA |= {"train_embeddings": True, "train_norms": True}


def model_of(device: str, dtype: torch.dtype, fuse: bool) -> LongContextModel:
    config = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
    config |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": TOKENS,
    }
    settings = {"rope": None, "context_length": TOKENS, "init_seed": 0, "device": device}
    model = training_model(build_base(None, config, dtype=dtype, fuse=fuse, **settings), LORA, fuse=fuse)
    if device != "meta":
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def loss_and_gradient(model: LongContextModel, policy: ActivationPolicy) -> tuple[float, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1024, (1, TOKENS), generator=generator).cuda()
    targets = torch.cat([ids[0, 1:], ids.new_full((1,), -100)])
    model.follow(policy)
    loss = model(ids, torch.arange(TOKENS).cuda()[None], targets, plan_segments([TOKENS], 256).to("cuda"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained)
    return float(loss.detach()), torch.cat([gradient.float().flatten() for gradient in gradients])


def test_fused_operators_give_what_the_model_s_own_give() -> None:
    """Gradients of embeddings, norms and LoRA, in bf16: no further from fp32 than twice the model's own in bf16."""
    refused = fused.refusal("llama", "cuda")
    if refused:
        pytest.skip(refused)
    exact_model = model_of("cuda", torch.bfloat16, fuse=False)
    _, own = loss_and_gradient(exact_model, ActivationPolicy(4))
    ours_model = model_of("cuda", torch.bfloat16, fuse=True)
    ours_model.load_state_dict(exact_model.state_dict())
    loss, ours = loss_and_gradient(ours_model, ActivationPolicy(4))
    exact_loss, exact = loss_and_gradient(exact_model.float(), ActivationPolicy(4))
    assert loss == pytest.approx(exact_loss, rel=2e-3)
    assert (ours - exact).norm() <= 2 * (own - exact).norm()


@pytest.mark.parametrize("policy", [ActivationPolicy(0, offload=True), ActivationPolicy(1, 2, offload=True)], ids=str)
def test_inputs_that_wait_in_host_memory_come_back_whole(policy: ActivationPolicy) -> None:
    model = model_of("cuda", torch.bfloat16, fuse=False)
    _, wanted = loss_and_gradient(model, ActivationPolicy(4))
    for _ in range(3):  # a copy that comes too late would be wrong now and then
        assert torch.equal(loss_and_gradient(model, policy)[1], wanted)


@pytest.mark.parametrize("fuse", [False, True])
def test_the_probe_of_shapes_alone_is_the_probe_of_the_gpu(fuse: bool) -> None:
    if fuse and fused.refusal("llama", "cuda"):
        pytest.skip(fused.refusal("llama", "cuda"))
    measured = probe(model_of("cuda", torch.bfloat16, fuse), 256)
    counted = probe(model_of("meta", torch.bfloat16, fuse), 256)
    assert counted.everything == pytest.approx(measured.everything, rel=0.05)
    assert counted.attention == pytest.approx(measured.attention, rel=0.05)
    assert counted.everything + counted.work == pytest.approx(measured.everything + measured.work, rel=0.1)
