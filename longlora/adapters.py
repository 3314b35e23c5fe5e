"""What is trained: LoRA with embeddings and norms (the paper's LoRA⁺), or every weight; and its parameter groups."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

GROUPS = ("lora_a", "lora_b", "embeddings", "norms", "weights")
ADAPTER_NAME = "default"


def attach_adapter(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: list[str] | Literal["auto"],
    rslora: bool,
    dora: bool,
    train_embeddings: bool,
    train_norms: bool,
) -> PeftModel:
    """Freezes `model` and puts LoRA on the linear layers named in `targets`, on the attention projections if "auto".

    `train_embeddings` and `train_norms` train full copies of the input embeddings and of every norm (LongLoRA, section
    3.3); tied output embeddings stay tied. New weights have the type of the base: fp32 masters are the optimizer's
    business.
    Raises ValueError if a target names no linear layer, and for tied embeddings that PEFT cannot keep tied.
    """
    tied = _is_tied(model)
    modules_to_save = []
    if train_embeddings:
        modules_to_save.append(_name_of(model, model.get_input_embeddings()))
    if train_norms:
        modules_to_save += norm_names(model)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT annotates int, and only divides it
        lora_dropout=dropout,
        target_modules=attention_projections(model) if targets == "auto" else _checked_targets(model, targets),
        use_rslora=rslora,
        use_dora=dora,
        modules_to_save=modules_to_save or None,
        ensure_weight_tying=train_embeddings and tied,
    )
    network = get_peft_model(model, lora, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)
    if tied and not _is_tied(model):
        raise ValueError(
            f"PEFT takes the tied embeddings of {model.config.model_type} apart: set train_embeddings to false"
        )
    return network


def enable_full_training(model: PreTrainedModel) -> PreTrainedModel:
    """Makes every weight trainable: full fine-tuning, or pre-training of a random model."""
    return model.requires_grad_(True)


def attention_projections(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers directly inside attention modules, e.g. q_proj, k_proj, v_proj, o_proj.

    An attention module is known by its `is_causal` flag, which transformers' attention interface reads.
    """
    names = {
        name
        for module in model.modules()
        if hasattr(module, "is_causal")
        for name, child in module.named_children()
        if isinstance(child, nn.Linear)
    }
    if not names:
        raise ValueError(
            f"adapter targets 'auto': no linear layers inside attention modules of {type(model).__name__}; name them"
        )
    return sorted(names)


def norm_names(model: nn.Module) -> list[str]:
    """Full names of the modules that own normalisation weights."""
    return [name for name, module in model.named_modules() if _is_norm(module)]


def parameter_groups(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Every trainable parameter once, with its name as in `model.named_parameters()`, by what it is.

    lora_a, lora_b, embeddings (also output embeddings where tied), norms (weights and biases), and weights: the
    rest, which is all matrices and other biases of full training, and DoRA's magnitudes. Empty groups are left out.
    """
    kind = {id(p): "embeddings" for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    kind |= {id(p): "norms" for m in model.modules() if _is_norm(m) for p in m.parameters(recurse=False)}
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_lora_group(name) or kind.get(id(parameter), "weights")].append((name, parameter))
    return {group: members for group, members in groups.items() if members}


@dataclass(frozen=True)
class TrainableReport:
    """Numbers of parameters: trained, in the whole model (adapter included), and trained by group."""

    trainable: int
    total: int
    by_group: dict[str, int]

    def __str__(self) -> str:
        groups = ", ".join(f"{group} {count:,}" for group, count in self.by_group.items())
        return f"{self.trainable:,} of {self.total:,} parameters train ({self.trainable / self.total:.2%}): {groups}"


def trainable_report(model: nn.Module) -> TrainableReport:
    """Counts parameters, each once; a parameter that ZeRO-3 has partitioned counts in full."""
    by_group = {group: sum(_size(p) for _, p in members) for group, members in parameter_groups(model).items()}
    return TrainableReport(sum(by_group.values()), sum(_size(p) for p in model.parameters()), by_group)


def peft_key(parameter_name: str) -> str:
    """The key in `adapter_model.safetensors` of a trainable parameter of a PeftModel: without the adapter's name.

    base_model.model.x.lora_A.default.weight → base_model.model.x.lora_A.weight;
    base_model.model.x.modules_to_save.default.weight → base_model.model.x.weight
    """
    saved_module = f".modules_to_save.{ADAPTER_NAME}."
    if saved_module in parameter_name:
        return parameter_name.replace(saved_module, ".")
    key, replaced = re.subn(rf"\.(lora_[AB])\.{ADAPTER_NAME}\.", r".\1.", parameter_name)
    if not replaced:
        key, replaced = re.subn(rf"\.lora_magnitude_vector\.{ADAPTER_NAME}\.weight$", ".lora_magnitude_vector", key)
    if not replaced:
        raise ValueError(
            f"{parameter_name} is no adapter parameter: only LoRA weights and saved modules have a PEFT key"
        )
    return key


def adapter_keys(names: Iterable[str], network: PeftModel) -> dict[str, str]:
    """Keys of `adapter_model.safetensors` → names of `network`'s parameters that are saved under them.

    Tied embeddings come under both of their names: PeftModel.from_pretrained demands it.
    """
    names_by_key = {peft_key(name): name for name in names}
    model = cast(PreTrainedModel, network.get_base_model())
    if _is_tied(model):
        source, second = (
            f"base_model.model.{_name_of(model, module)}.weight"
            for module in (model.get_input_embeddings(), model.get_output_embeddings())
        )
        if source in names_by_key:
            names_by_key[second] = names_by_key[source]
    return names_by_key


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module)


def _is_tied(model: PreTrainedModel) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def _is_norm(module: nn.Module) -> bool:
    # By class name, since every family brings its own RMSNorm, and a partitioned weight has no shape to go by.
    return "Norm" in type(module).__name__ and next(module.parameters(recurse=False), None) is not None


def _checked_targets(model: PreTrainedModel, targets: list[str]) -> list[str]:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(f"adapter target {target!r} names no linear layer; this model has {', '.join(known)}")
    return targets


def _lora_group(name: str) -> str | None:
    if ".lora_A." in name:
        return "lora_a"
    return "lora_b" if ".lora_B." in name else None


def _size(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())
