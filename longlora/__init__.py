"""LongLoRA (arXiv 2309.12307): the method, tensors in and tensors out.

Shifted sparse attention, LoRA with trainable embeddings and norms, context extension of RoPE, chunked loss, dense
evaluation. Needs torch, transformers and peft; knows nothing of clusters, data loading or tracking.
"""
