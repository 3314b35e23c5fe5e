"""What FlashAttention's kernels ask of device, precision and head size, in torch and in flash-attn alike."""

import torch


def kernel_refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a FlashAttention kernel cannot run there; None if it can."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"needs a head size that is a multiple of 8 and at most 256, not {head_dim}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs compute capability 8.0 (Ampere) or newer, not {major}.{minor}"
    return None
