"""Context extension by rotary position embeddings: the config of a model that reads further than its base.

Only the transformers config changes. Each method yields a form whose inverse frequencies follow from the config alone,
the same after saving and loading and whatever the batch. `rope_theta` and `partial_rotary_factor` live in the same dict
as the method, `config.rope_parameters`, and are kept: a model that loses its theta is lost.
"""

import copy
from typing import Any

from transformers import PreTrainedConfig

METHODS = ("linear", "ntk", "dynamic", "yarn", "llama3")


def extend_rope(config: PreTrainedConfig, target_length: int, method: str) -> PreTrainedConfig:
    """A copy of `config` whose rotary positions reach `target_length` tokens, its new `max_position_embeddings`.

    A model that is already scaled is extended from what it has; its `max_position_embeddings` is what it reaches now.
    (Some linearly scaled models were published with the length before scaling there: it has to be corrected first.)

    linear: positions shrink by the ratio of lengths (position interpolation, Chen et al. 2023, arXiv 2306.15595).
    ntk: theta grows by ratio^(d/(d−2)), d the rotary dimension: the slowest frequency shrinks by the ratio, the fastest
        stays.
    dynamic: the theta that transformers' dynamic NTK scaling with factor = ratio has at `target_length` tokens, fixed;
        dynamic scaling itself would change the model with the length of the batch.
    yarn: Peng et al. 2023 (arXiv 2309.00071). llama3: the piecewise scaling of Llama 3.1.

    Raises ValueError for an unknown method, a target below the present length, a model without rotary positions, and a
    scaled model that the method cannot continue.
    """
    if method not in METHODS:
        raise ValueError(f"rope method {method!r} is unknown: choose one of {', '.join(METHODS)}")
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or "rope_theta" not in parameters:
        raise ValueError(f"{config.model_type} has no single set of rotary position parameters that could be extended")
    extended = copy.deepcopy(config)
    _fix_dynamic(extended)
    native = extended.max_position_embeddings
    if target_length < native:
        raise ValueError(f"target length {target_length} is below the model's {native}: a context is not shrunk")
    if target_length > native:
        extended.rope_parameters = _extended(extended, target_length, method)
        extended.max_position_embeddings = target_length
    return extended


def _extended(config: PreTrainedConfig, target: int, method: str) -> dict[str, Any]:
    native, parameters = config.max_position_embeddings, dict(config.rope_parameters)
    ratio, present = target / native, parameters["rope_type"]
    if method in ("ntk", "dynamic") and present in ("default", "linear"):
        # A larger theta multiplies each frequency, and so does a linear factor: they combine freely.
        stretch = ratio if method == "ntk" else ratio * target / native - (ratio - 1)
        return parameters | {"rope_theta": _ntk_theta(config, stretch)}
    if method == present:
        return parameters | {"factor": parameters["factor"] * target / native}
    if present != "default":
        raise ValueError(
            f"rope method {method!r} cannot continue a model scaled with {present!r}; "
            + (f"use {present!r}" if present in METHODS else "no method can")
        )
    added: dict[str, Any] = {"rope_type": method, "factor": ratio}
    if method in ("yarn", "llama3"):
        added["original_max_position_embeddings"] = native
    if method == "llama3":
        added |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # as in Llama 3.1
    return parameters | added


def _fix_dynamic(config: PreTrainedConfig) -> None:
    """Turns dynamic NTK scaling into the static base that it has at the longest context it is made for."""
    parameters = config.rope_parameters
    if parameters["rope_type"] == "dynamic":
        # Here, and only here, max_position_embeddings is the length before scaling.
        factor = parameters["factor"]
        theta = _ntk_theta(config, factor * factor - (factor - 1))
        kept = {key: value for key, value in parameters.items() if key != "factor"}
        config.rope_parameters = kept | {"rope_type": "default", "rope_theta": theta}
        config.max_position_embeddings = int(config.max_position_embeddings * factor)


def _ntk_theta(config: PreTrainedConfig, stretch: float) -> float:
    dim = rotary_dimension(config)
    return config.rope_parameters["rope_theta"] * stretch ** (dim / (dim - 2))


def rotary_dimension(config: PreTrainedConfig) -> int:
    """Number of dimensions of a head that are rotated; fewer than all in GPT-NeoX."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
