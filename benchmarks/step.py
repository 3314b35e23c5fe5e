"""How long does a training step take, and what does it hold? One GPU, random weights of a 7B or 8B model. (B6, B7, B9)

    python benchmarks/step.py --save                                  # Llama-2-7B shapes, 8k to 100k tokens
    python benchmarks/step.py --model llama3-8b --cases 102400:8192 --contenders recompute --save
    python benchmarks/step.py --cases 262144:8192,327680:8192 --contenders recompute --save    # longest context
    python benchmarks/step.py --document 12000 --cases 32768:2048 --contenders recompute,auto --save    # packed rows

A step is forward, backward and AdamW over LoRA (rank 8 on the attention projections), embeddings and norms, on one row
of one document, or of several of ``--document`` tokens. Contenders, one after the other on the same GPU, in this order:

- ``hf``: transformers + PEFT as they come: full attention (torch's own), every layer recomputed, the library's loss;
- ``hf-s2``: the same with S²-Attn by the data movement of the published code, corrected;
- ``full``: this project's model with full attention, every layer recomputed;
- ``recompute``: S²-Attn, every layer recomputed, MLP in pieces where the row is longer than 64k;
- ``recompute-all``: as ``recompute``, but each layer runs again to its end, as under reentrant checkpoints: 6
  operations a weight and token. ``recompute`` stops at the last tensor that is needed, which spares a frozen down_proj:
  5.6. Keeping everything takes 4;
- ``recompute-host``: as ``recompute``, layer inputs in pinned host memory;
- ``auto``: S²-Attn, and of the activations what fits;
- ``lora``: as ``auto``, without trained embeddings and norms.

``of ideal``: the operations that the step needs (recomputation not counted) ÷ 790 TFLOP/s, the rate that the goals
reckon with, as a share of the time it took; ``gpu_rates.py`` measures what large products reach. ``predicted``: peak
memory by `longlora.memory`, from a probe at 4096 tokens.
Before anything is timed, a small model with everything on is compared with transformers' own operators in fp32: same
loss, same gradients.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from attention_kernels import original_movement
from figures import as_table, documents_of, machine, save, verdict
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import AttentionInterface

from longlora import fused
from longlora.activations import ActivationPolicy
from longlora.attention import Shape, choose_backend
from longlora.flops import step_operations
from longlora.memory import MLP_TILE, required
from longlora.model import LongContextModel, build_base, training_model
from longlora.probe import auto_policy, head_cost, probe
from longlora.segments import SegmentPlan, plan_segments

LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_dropout": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama2-7b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096},
    "llama3-8b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192},
    "tiny": LLAMA
    | {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"num_key_value_heads": 4, "vocab_size": 1024, "max_position_embeddings": 256},
}
LORA = {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": "auto", "rslora": False, "dora": False}
CASES = [(8192, 2048), (32768, 8192), (65536, 8192), (102400, 8192)]
GROUPS = [("hf", "hf-s2"), ("full", "recompute-all", "recompute", "recompute-host", "auto"), ("lora",)]
IN_FULL = ("hf", "full")
PEAK_RATE = 790e12
TILED_FROM = 65536  # tokens beyond which `recompute` runs the MLP in pieces

# The goals, at 8k, 32k, 64k and 100k tokens: what must hold, for Llama-2-7B shapes on an H200. That of ``auto`` is set
# against 6 operations a weight and token: ``recompute-all``.
OVER_HF = dict(zip(CASES, (1.10, 1.5, 2.0, 2.7), strict=True))
TOKENS_PER_SECOND = dict(zip(CASES, (18e3, 15e3, 13e3, 12e3), strict=True))
AUTO_OVER_ALL = dict(zip(CASES, (1.35, 1.35, 1.12, 1.07), strict=True))
PEAK_GIB = {"llama2-7b": 75, "llama3-8b": 85}
LORA_SHARE = 1 / 1.03
HOST_SHARE = 1 / 1.03

PUBLISHED = "s2-published"
Step = Callable[[Tensor, SegmentPlan], Tensor]
Case = tuple[int, int | None, str]
"""Tokens, group size (None: full attention) and contender."""


def published_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, *, segment_plan: SegmentPlan, **_: Any
) -> tuple[Tensor, None]:
    """`original_movement` where transformers asks for attention; q, k, v (1, H, T, d), keys and values repeated."""
    each = query.shape[1] // key.shape[1]
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    k, v = (t.repeat_interleave(each, dim=1) for t in (k, v))
    return original_movement(q, k, v, segment_plan)[None], None


AttentionInterface.register(PUBLISHED, published_attention)


class Masters:
    """AdamW over fp32 copies of the trained parameters, as DeepSpeed keeps them."""

    def __init__(self, model: nn.Module) -> None:
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.copies = [p.detach().float().requires_grad_() for p in self.trained]
        self.optimizer = torch.optim.AdamW(self.copies, lr=1e-5, fused=True)
        for copy in self.copies:
            copy.grad = torch.zeros_like(copy)
        self.optimizer.step()  # the moments are there from now on, for whoever asks what is free
        self.optimizer.zero_grad()

    def step(self) -> None:
        for parameter, copy in zip(self.trained, self.copies, strict=True):
            copy.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self.optimizer.step()
        for parameter, copy in zip(self.trained, self.copies, strict=True):
            parameter.detach().copy_(copy)


def build(options: argparse.Namespace, longest: int, *, ours: bool, embeddings_and_norms: bool) -> LongContextModel:
    """The model on the device; `ours` with S²-Attn and fused parts, else as transformers makes it."""
    base = build_base(
        None,
        MODELS[options.model],
        dtype=torch.bfloat16 if options.device == "cuda" else torch.float32,
        rope="linear",
        context_length=longest,
        init_seed=0,
        fuse=ours and options.fused,
        attention="s2" if ours else "sdpa",
        device=options.device,
    )
    trained = {"train_embeddings": embeddings_and_norms, "train_norms": embeddings_and_norms}
    return training_model(base, LORA | trained, fuse=ours and options.fused)


def stepper(name: str, model: LongContextModel) -> Step:
    """One training step of the contender: (ids (1, T), plan) → loss a token."""
    masters = Masters(model)

    def step(ids: Tensor, plan: SegmentPlan) -> Tensor:
        with set_checkpoint_early_stop(name != "recompute-all"):
            if name.startswith("hf"):
                loss = model.network(input_ids=ids, labels=ids, use_cache=False, segment_plan=plan).loss
            else:
                places, targets = packed(ids, plan)
                loss = model(ids, places, targets, plan) / (plan.tokens - len(plan.document_lengths))
        loss.backward()
        masters.step()
        return loss.detach()

    return step


def packed(ids: Tensor, plan: SegmentPlan) -> tuple[Tensor, Tensor]:
    """Positions (1, T), which begin anew with each document, and the next tokens (T,) inside each document."""
    lengths = torch.tensor(plan.document_lengths, device=ids.device)
    ends = lengths.cumsum(0)
    places = torch.arange(plan.tokens, device=ids.device) - (ends - lengths).repeat_interleave(lengths)
    targets = torch.cat([ids[0, 1:], ids.new_full((1,), -100)]).index_fill(0, ends - 1, -100)
    return places[None], targets


def policy_of(name: str, model: LongContextModel, plan: SegmentPlan) -> ActivationPolicy:
    if name in ("auto", "lora"):
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return auto_policy(model, plan, probe(model, plan.group_size), reserved=6 * trained)
    is_tiled = plan.tokens > TILED_FROM and name.startswith("recompute")
    return ActivationPolicy(0, offload=name == "recompute-host", mlp_tile=MLP_TILE if is_tiled else None)


def measure(name: str, model: LongContextModel, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each case."""
    step = stepper(name, model)
    if name.startswith("hf"):
        model.causal_lm.set_attn_implementation("sdpa" if name == "hf" else PUBLISHED)
    for tokens, group_size in options.cases:
        documents = documents_of(tokens, options.document)
        plan = plan_segments(documents, None if name in IN_FULL else group_size).to(options.device)
        row: dict[str, Any] = {"tokens": tokens, "group_size": plan.group_size, "contender": name}
        try:
            row |= timed(name, model, step, plan, options)
        except torch.OutOfMemoryError:
            row["policy"] = "out of memory"
            for parameter in model.parameters():
                parameter.grad = None
        print(row, flush=True)
        yield row
        gc.collect()
        torch.cuda.empty_cache()


def timed(
    name: str, model: LongContextModel, step: Step, plan: SegmentPlan, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds a step: the median after one to warm up, of at least two, of one where a step is slow. Peak memory."""
    policy = policy_of(name, model, plan)
    predicted = predicted_gib(model, policy, plan) if not name.startswith("hf") else None
    model.follow(policy)
    vocabulary = MODELS[options.model]["vocab_size"]
    ids = torch.randint(vocabulary, (1, plan.tokens), device=options.device)
    is_slow = name in IN_FULL or plan.tokens > 131072
    seconds: list[float] = []
    loss = step(ids, plan)  # to warm up
    while len(seconds) < (1 if is_slow else 2) or (sum(seconds) < options.seconds and len(seconds) < 10):
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = step(ids, plan)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if not math.isfinite(float(loss)):
        raise SystemExit(f"{name}: the loss is {float(loss)}")
    median = statistics.median(seconds)
    operations = step_operations(model, model.causal_lm.config, plan)
    return {
        "seconds": round(median, 3),
        "steps": len(seconds),
        "spread": f"{(max(seconds) - min(seconds)) / median:.1%}" if len(seconds) > 1 else "",
        "tokens/s": round(plan.tokens / median),
        "of ideal": round(operations / PEAK_RATE / median, 3),
        "TFLOP/s": round(operations / median / 1e12),
        "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "predicted GiB": predicted and round(predicted, 1),
        "policy": str(policy),
    }


def predicted_gib(model: LongContextModel, policy: ActivationPolicy, plan: SegmentPlan) -> float:
    """What the memory model says of the peak: weights, optimizer, gradients, activations."""
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    there = torch.cuda.memory_allocated() + gradients
    head = head_cost(model, plan.tokens, model.is_head_fused)
    return (there + required(probe(model, plan.group_size), policy, plan.tokens, head)) / 2**30


def check(options: argparse.Namespace) -> None:
    """A tiny model in bf16 with everything on, and the published form: loss and gradients, against fp32 operators."""
    small = argparse.Namespace(**vars(options) | {"model": "tiny"})
    plan = plan_segments([1024], 256).to(options.device)
    ids = torch.randint(1024, (1, 1024), generator=torch.Generator().manual_seed(0)).to(options.device)
    targets, places = torch.cat([ids[0, 1:], ids.new_full((1,), -100)]), torch.arange(1024, device=options.device)[None]
    ours = build(small, 1024, ours=True, embeddings_and_norms=True)
    plain = build(small, 1024, ours=False, embeddings_and_norms=True)
    published = build(small, 1024, ours=False, embeddings_and_norms=True)
    plain.causal_lm.set_attn_implementation("s2")
    published.causal_lm.set_attn_implementation(PUBLISHED)
    generator = torch.Generator(options.device).manual_seed(1)
    with torch.no_grad():
        for (name, parameter), *others in zip(
            ours.named_parameters(), plain.parameters(), published.parameters(), strict=True
        ):
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=generator)
            for other in others:
                other.copy_(parameter)
    exact = plain.float()
    exact.attention_backend = "sdpa"
    results = []
    for model, policy in (
        (exact, ActivationPolicy(4)),
        (published, ActivationPolicy(0)),
        (ours, ActivationPolicy(4)),
        (ours, ActivationPolicy(1, 2, offload=True, mlp_tile=300)),
    ):
        model.follow(policy)
        loss = model(ids, places, targets, plan)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, trained)
        results.append((float(loss.detach()), torch.cat([g.float().flatten() for g in gradients])))
    (loss, gradient), *compared = results
    for other_loss, other in compared:
        error = float((other - gradient).norm() / gradient.norm())
        print(f"checked: loss {other_loss:.3f}, exact {loss:.3f}; gradients differ by {error:.2e}")
        if not (abs(other_loss / loss - 1) < 2e-3 and error < 3e-2):
            raise SystemExit("the model gives other results than transformers' own operators")


def judge(rows: list[dict[str, Any]], model: str, *, has_goals: bool) -> None:
    """Adds the ratios, and where the goals are for what was measured, the verdicts."""
    seconds = {_case(row): row["seconds"] for row in rows if "seconds" in row}
    for row in rows:
        verdicts = []
        if "seconds" in row:
            spread = float(row["spread"].rstrip("%") or 0) / 100
            for text, ratio, goal in ratios(row, seconds):
                judged = f" (goal {goal:.2f}): {verdict(ratio, goal, spread)}" if goal and has_goals else ""
                verdicts.append(f"{text} {ratio:.3f}{judged}")
            if has_goals and _case(row) == (102400, 8192, "recompute"):
                fits = row["peak GiB"] <= PEAK_GIB[model]
                verdicts.append(f"peak at most {PEAK_GIB[model]} GiB: {'PASS' if fits else 'FAIL'}")
        row["verdict"] = "; ".join(verdicts)


def ratios(row: dict[str, Any], seconds: dict[Case, float]) -> list[tuple[str, float, float | None]]:
    """(what, ratio, goal if there is one) of a row, beside each other contender that was measured."""
    tokens, group_size, contender = _case(row)
    case = tokens, group_size
    compared: dict[str, list[tuple[str, float | None]]] = {
        "recompute": [("hf", OVER_HF.get(case)), ("hf-s2", None)],
        "recompute-host": [("recompute", HOST_SHARE)],
        "auto": [("recompute-all", AUTO_OVER_ALL.get(case)), ("recompute", None), ("lora", LORA_SHARE)],
    }
    found = [
        (f"speed over {other}", seconds[rival] / row["seconds"], goal)
        for other, goal in compared.get(contender, [])
        if (rival := (tokens, None if other in IN_FULL else group_size, other)) in seconds
    ]
    if contender == "auto" and case in TOKENS_PER_SECOND:
        found.append(("tokens/s over goal", row["tokens/s"] / TOKENS_PER_SECOND[case], 1.0))
    return found


def _case(row: dict[str, Any]) -> Case:
    return row["tokens"], row["group_size"], row["contender"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="llama2-7b")
    parser.add_argument(
        "--cases", type=lambda s: [tuple(int(n) for n in c.split(":")) for c in s.split(",")], default=CASES,
        help="tokens:group_size, comma between cases",
    )  # fmt: skip
    parser.add_argument("--document", type=int, help="tokens of each document of a row; default: the whole row is one")
    parser.add_argument("--contenders", type=lambda s: s.split(","), default=[name for g in GROUPS for name in g])
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each case")
    parser.add_argument("--no-fused", dest="fused", action="store_false", help="the model's own operators")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-<name>.md")
    parser.add_argument("--name", help="of the results; default: step-<model>")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    if options.document and any(name.startswith("hf") for name in options.contenders):
        parser.error("hf and hf-s2 attend across documents: leave them out with --document")
    options.device = "cuda"
    refused = fused.refusal("llama", "cuda")
    if options.fused and refused:
        print(f"without fused parts: {refused}")
        options.fused = False
    return options


def main() -> int:
    """0 if no goal is missed."""
    options = parse()
    check(options)
    longest = max(tokens for tokens, _ in options.cases)
    facts = machine("cuda", model=options.model, fused=options.fused, memory=f"{total_gib():.0f} GiB")
    facts["attention"] = {f"{tokens}, G {g}": attention_of((tokens, g), options) for tokens, g in options.cases}
    has_goals = options.model == "llama2-7b" and not options.document and "H200" in facts["processor"]
    rows: list[dict[str, Any]] = []
    for group in GROUPS:
        names = [name for name in group if name in options.contenders]
        if not names:
            continue
        model = build(options, longest, ours="hf" not in group, embeddings_and_norms="lora" not in group)
        for name in names:
            for row in measure(name, model, options):
                rows.append(row)
                judge(rows, options.model, has_goals=has_goals)
                if options.save:  # what was measured stays, whatever comes next
                    path = save(options.name or f"step-{options.model}", "A training step", facts, rows)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    print(as_table(rows))
    if options.save:
        print(f"written to {path}")
    return 1 if any("FAIL" in row["verdict"] for row in rows) else 0


def attention_of(case: tuple[int, int], options: argparse.Namespace) -> str:
    """The backend that attends in a row of the case, and why, or how long each took."""
    shapes = MODELS[options.model]
    head_dim = shapes["hidden_size"] // shapes["num_attention_heads"]
    heads, kv_heads = shapes["num_attention_heads"], shapes["num_key_value_heads"]
    shape = Shape(torch.device("cuda"), torch.bfloat16, heads, kv_heads, head_dim)
    return str(choose_backend(shape, plan_segments(documents_of(case[0], options.document), case[1])))


def total_gib() -> float:
    return torch.cuda.get_device_properties(0).total_memory / 2**30


if __name__ == "__main__":
    sys.exit(main())
