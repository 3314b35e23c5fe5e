"""Base and adapter as one plain model, which transformers loads and continues without PEFT or this package."""

from pathlib import Path

from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def merged_model(base: str | PreTrainedModel, adapter_folder: str | Path) -> PreTrainedModel:
    """The base with the adapter's LoRA added to its weights, and with the adapter's embeddings and norms; ties stay.

    base: folder or hub name, or a model that is already extended (it is changed in place). adapter_folder: an adapter
    in PEFT's form with the *extended* `config.json` beside it. Weights keep the base's type.
    Raises ValueError if the folder lacks either, or if a given base reads positions otherwise than the adapter's.
    """
    folder = Path(adapter_folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: the extended model config belongs beside the adapter")
    if not (folder / "adapter_model.safetensors").is_file():  # PEFT would go on to a pickle
        raise ValueError(f"{folder} has no adapter_model.safetensors: adapters in any other form are not loaded")
    extended = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if isinstance(base, str):
        base = AutoModelForCausalLM.from_pretrained(
            base, config=extended, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
    elif base.config.rope_parameters != extended.rope_parameters:
        raise ValueError(
            f"the base's rotary positions {base.config.rope_parameters} differ from those that the adapter was trained "
            f"with, {extended.rope_parameters}: extend the base in the same way"
        )
    merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    merged.tie_weights()
    return merged
