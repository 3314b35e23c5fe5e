"""From a base model to one that trains on long rows: base → rope → attention → adapters → summed loss."""

import copy
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from longlora import fused
from longlora.activations import ActivationPolicy, apply_policy, kept_outputs, layers_of
from longlora.adapters import attach_adapter, enable_full_training
from longlora.attention import BackendChoice, Shape, choose_backend, hf
from longlora.lora_linear import fuse_lora
from longlora.loss import summed_cross_entropy
from longlora.rope import extend_rope
from longlora.segments import SegmentPlan, plan_segments


class LongContextModel(nn.Module):
    """A causal language model that takes one row of documents and returns the sum of its token losses.

    `network` is the transformers model, or the PeftModel around it; `attention_backend` is `s2_attention`'s `backend`.
    All activations are kept for the backward pass until `follow` says otherwise.
    """

    def __init__(self, network: PreTrainedModel | PeftModel, attention_backend: str = "auto") -> None:
        super().__init__()
        self.network = network
        self.attention_backend = attention_backend
        self.layers = len(layers_of(network))
        self.policy = ActivationPolicy(kept=self.layers)

    def follow(self, policy: ActivationPolicy) -> None:
        """Keeps of the activations what `policy` says, from the next row on."""
        apply_policy(self.network, policy)
        self.policy = policy

    def forward(self, input_ids: Tensor, position_ids: Tensor, targets: Tensor, segment_plan: SegmentPlan) -> Tensor:
        """Σ −log p(target) in nats, an fp32 scalar.

        input_ids, position_ids (1, T) int64, positions restarting at each document; targets (T,) int64, the token that
        follows, −100 for none; segment_plan for the same T tokens.
        """
        hidden = self.hidden_states(input_ids, position_ids, segment_plan)
        return summed_cross_entropy(hidden[0], self.causal_lm.get_output_embeddings(), targets)

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, segment_plan: SegmentPlan) -> Tensor:
        """(1, T, D), after the last norm: the decoder alone, for the causal model would make the logits of the row."""
        is_run_again = self.training and torch.is_grad_enabled()
        output = self.causal_lm.get_decoder()(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            segment_plan=segment_plan,
            attention_backend=self.attention_backend,
            kept_outputs=kept_outputs(self.policy, self.layers) if is_run_again else None,
        )
        return output.last_hidden_state

    @property
    def is_head_fused(self) -> bool:
        """Whether output layer and loss run as one kernel."""
        return fused.can_fuse_head(self.causal_lm.get_output_embeddings(), self.causal_lm.device)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model inside."""
        network = self.network
        return cast(PreTrainedModel, network.get_base_model() if isinstance(network, PeftModel) else network)

    def backend_choice(self, device: torch.device | str, plan: SegmentPlan) -> BackendChoice:
        """The attention backend for rows like the plan's on `device`; ValueError if it is a named one that cannot."""
        config: PreTrainedConfig = self.network.config
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape = Shape(torch.device(device), cast(torch.dtype, self.network.dtype), heads, kv_heads, head_dim)
        return choose_backend(shape, plan, self.attention_backend)


def build_base(
    name_or_path: str | None,
    model_config: dict[str, Any] | None,
    *,
    dtype: torch.dtype,
    rope: str | None,
    context_length: int,
    native_length: int | None = None,
    sliding_window: Literal["model"] | None = "model",
    init_seed: int,
    fuse: bool = False,
    attention: Literal["s2", "sdpa"] = "s2",
    device: str = "cpu",
    revision: str | None = None,
) -> PreTrainedModel:
    """The base model with its context extended to `context_length` by the `rope` method (see `extend_rope`).

    From a Hugging Face folder or hub name (safetensors only), or, randomly initialised with `init_seed`, from a
    transformers config with its `model_type`. `native_length` corrects a config whose `max_position_embeddings` is not
    what the model reads (see `extend_rope`). `rope` None keeps the model's positions, which must then reach
    `context_length`. `sliding_window` None removes the model's window, "model" keeps it. `fuse` puts Liger's kernels
    in where it has them for this family (see `fused.refusal`); they run on a GPU only. Weights are loaded on
    the CPU; random ones are made on `device`. On "meta" nothing is loaded: shapes only.
    Raises ValueError for a model that cannot be used, with the reason.
    """
    config = _base_config(name_or_path, model_config, revision)
    check_supported(config)
    if native_length is not None:
        config.max_position_embeddings = native_length
    config = _with_context(config, context_length, rope)
    config = _with_window(config, context_length, sliding_window)
    if attention == "s2":
        hf.register()
    options = {"dtype": dtype, "attn_implementation": attention}
    if device == "meta" or name_or_path is None:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(init_seed)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    else:
        model = _load(name_or_path, config, revision, options)
    if fuse and fused.refusal(config.model_type, "meta" if device == "meta" else "cuda") is None:
        fused.fuse(model)
    return model


def training_model(
    base: PreTrainedModel, adapter: dict[str, Any] | None, attention_backend: str = "auto", fuse: bool = False
) -> LongContextModel:
    """`base` ready to train: with the adapter that `attach_adapter` makes of these settings, or in full if None.

    `fuse` makes one function of each frozen layer and its LoRA, where that is possible.
    """
    network = enable_full_training(base) if adapter is None else attach_adapter(base, **adapter)
    if fuse:
        fuse_lora(network)
    # transformers loads models in eval mode, in which layers neither drop out nor recompute their activations.
    return LongContextModel(network, attention_backend).train()


def check_supported(config: PreTrainedConfig) -> None:
    """Raises ValueError with the reason if models of `config` cannot be trained with S²-Attn.

    Beyond the config, a dry run on the meta device shows what the model does: each layer must call the attention
    interface once, with nothing that S²-Attn refuses, and the logits must be the output layer of the hidden states.
    """
    family = config.model_type
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise ValueError(f"{family} is no decoder-only language model")
    if not _model_class(config)._supports_attention_backend:
        raise ValueError(f"{family} does not go through transformers' attention interface, where S²-Attn is put in")
    if "rope_theta" not in (getattr(config, "rope_parameters", None) or {}):
        raise ValueError(f"{family} has no rotary positions (or several kinds of them): its context cannot be extended")
    try:
        attention_calls, head_alone = _dry_run(config)
    except Exception as error:  # whatever stops an empty forward pass, the model cannot be trained
        raise ValueError(f"{family} cannot be trained: {_one_line(error)}") from error
    if attention_calls != config.num_hidden_layers:
        raise ValueError(
            f"{family} calls the attention interface {attention_calls} times in {config.num_hidden_layers} layers: "
            "S²-Attn, which is put in there, needs one softmax attention in each layer"
        )
    if not head_alone:
        raise ValueError(f"{family} scales or caps its logits, which the chunked loss does not")


def check_vocabulary(config: PreTrainedConfig, tokenizer_length: int) -> None:
    """Raises ValueError if the tokenizer has tokens without an embedding (the reverse is common padding)."""
    if tokenizer_length > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer_length} tokens and the model {config.vocab_size}: "
            "take the tokenizer that the model was trained with"
        )


def _dry_run(config: PreTrainedConfig) -> tuple[int, bool]:
    """Two tokens through the model on the meta device: (attention calls, whether logits = head(decoder's output))."""
    calls = []

    def checked_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        segment_plan: SegmentPlan,
        scaling: float | None = None,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        calls.append(module)
        dimensions = (query.shape[-1], key.shape[-1], value.shape[-1])
        if len(set(dimensions)) > 1:
            raise ValueError(f"its heads have {dimensions} dimensions in q, k and v, and S²-Attn needs equal ones")
        hf.refuse_unhandled(segment_plan, keywords)
        return query.transpose(1, 2), None

    AttentionInterface.register("s2-dry-run", checked_attention)
    config = copy.deepcopy(config)
    config._attn_implementation = "s2-dry-run"
    with torch.device("meta"):
        # Not by from_config, which would partition the model under ZeRO-3.
        model = _model_class(config)(config)
    hidden, head = [], []
    model.get_decoder().register_forward_hook(lambda module, inputs, output: hidden.append(output.last_hidden_state))
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: head.append((inputs[0], output)))
    tokens = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    plan = plan_segments([2], None)
    logits = model(input_ids=tokens, position_ids=tokens, use_cache=False, segment_plan=plan).logits
    head_input, head_output = head[0]
    return len(calls), logits is head_output and head_input._base is hidden[0]


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def _base_config(
    name_or_path: str | None, model_config: dict[str, Any] | None, revision: str | None
) -> PreTrainedConfig:
    if (name_or_path is None) == (model_config is None):
        raise ValueError("give exactly one of a model folder or name and a model config")
    try:
        if model_config is None:
            return AutoConfig.from_pretrained(cast(str, name_or_path), revision=revision, trust_remote_code=False)
        settings = dict(model_config)
        family = settings.pop("model_type", None)
        if family not in CONFIG_MAPPING:
            raise ValueError(f"its model_type is {family!r}: give one that transformers knows, e.g. 'llama'")
        return AutoConfig.for_model(family, **settings)
    except Exception as error:  # transformers' validation errors share no narrower class
        raise ValueError(f"model {name_or_path or 'config'!r} cannot be used: {_one_line(error)}") from error


def _with_context(config: PreTrainedConfig, length: int, rope: str | None) -> PreTrainedConfig:
    if rope is not None:
        return extend_rope(config, length, rope)
    if length > config.max_position_embeddings:
        raise ValueError(
            f"context length {length} exceeds the model's {config.max_position_embeddings}: choose a rope method"
        )
    return config


def _with_window(config: PreTrainedConfig, length: int, window: Literal["model"] | None) -> PreTrainedConfig:
    """The config with its sliding window kept or removed; one that is kept must reach over `length` tokens."""
    present = getattr(config, "sliding_window", None)
    if present is None:
        return config
    if window is None:
        config = copy.deepcopy(config)
        config.sliding_window = None
        if hasattr(config, "use_sliding_window"):
            config.use_sliding_window = False
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention"] * len(config.layer_types)
    elif present < length:
        raise ValueError(
            f"the model's sliding window of {present} tokens is shorter than the context length {length}: "
            "set sliding_window to null to remove it"
        )
    return config


def _load(
    name_or_path: str, config: PreTrainedConfig, revision: str | None, options: dict[str, Any]
) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            config=config,
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except OSError as error:
        raise ValueError(f"model {name_or_path!r} cannot be loaded: {_one_line(error)}") from error
    model, loading = loaded
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ValueError(f"model {name_or_path!r} lacks {len(missing)} weights, e.g. {missing[0]}")
    return model


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
