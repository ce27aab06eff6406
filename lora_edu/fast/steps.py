"""A training step with fewer launches: blocks compiled one by one, or a whole step replayed. Built in lesson 24.

A compiler writes one kernel for a chain of element-wise operations; a CUDA graph records every launch of a step and
replays them with a single one. Neither changes what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def compile_blocks(model: nn.Module, **options: Any) -> int:
    """Compile every block of a transformer in place, and its loss; returns how many blocks. Built in lesson 24.

    The blocks are the longest ``nn.ModuleList`` of the model. A few graphs serve all of them: compiling takes as long
    for 32 blocks as for two. A loss that goes through transformers' ``model.loss_function``, as that of decoders does,
    becomes a graph of its own, which spares the copies of the logits in float32; such a model can no longer be pickled
    whole, but copied and saved by ``save_adapter``. What lies outside, as the embedding, stays as it is.

    Args:
        model: with its adapters; inject them first.
        options: for ``torch.compile``. By default ``dynamic=False``: a further shape of the input is compiled anew.

    Raises:
        ValueError: if the model has no such list.

    Source: PyTorch's recipe "Reducing torch.compile cold start compilation time with regional compilation".
    """
    blocks = max((part for part in model.modules() if isinstance(part, nn.ModuleList)), key=len, default=())
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no nn.ModuleList of blocks: call compile() on its parts yourself")
    options = {"dynamic": False} | options
    for block in blocks:
        block.compile(**options)
    if isinstance(model, PreTrainedModel) and model.loss_type is not None:
        model.loss_function = torch.compile(model.loss_function, **options)
    return len(blocks)


def causal_attention() -> str:
    """Make "causal" known to transformers, attention that needs no mask, and return this name. Built in lesson 24.

    For ``LlamaConfig(attn_implementation=...)`` or ``model.set_attn_implementation(...)``. It computes what "sdpa" does
    for rows without padding, or padded on the right with labels of -100 there: no token looks ahead at the padding. A
    padding mask is NOT looked at: rows padded on the left come out wrong. "sdpa" gets no mask for full rows either,
    but one while a CUDA graph is captured: compiled blocks were not compiled for it, others lose the fastest kernel.

    Raises:
        ValueError: in the forward pass, if the attention is not causal or is handed a mask, or has a cache.

    Source: transformers' "Attention interface"; ``is_tracing`` in its masking_utils.py.
    """
    AttentionInterface.register("causal", _causal)
    return "causal"


def capture_step(step: Callable[[], Tensor], warmup: int = 3, pool: Any = None) -> Callable[[], Tensor]:
    """Record a whole training step as one CUDA graph; the function that comes back replays it. Built in lesson 24.

    A replay repeats the recorded kernels on the recorded addresses, so:
        - the batch is read from the same tensors; bring in the next one, of the same shape, by ``ids.copy_(batch)``;
        - the optimizer is made with ``capturable=True``; a learning rate that is to change is a tensor on the GPU;
        - no shape depends on the padding, and nothing asks the GPU for a number (``.item()``, ``if loss > 3``);
        - a decoder of transformers uses ``causal_attention``, or else a mask is built in every replay;
        - no earlier loss is kept that still holds on to its backward pass.

    Args:
        step: forward, backward, ``optimizer.step()``, ``optimizer.zero_grad()``; returns the detached loss.
        warmup: steps taken beforehand, real ones. They compile, and create the optimizer's state.
        pool: with one ``torch.cuda.graph_pool_handle()`` several graphs share the gigabytes of their activations; read
            each loss before another graph is replayed.

    Returns:
        a function that takes one step and returns the loss, a tensor () that the next replay overwrites.

    Raises:
        RuntimeError: if there is no CUDA device, or the step cannot be captured; the first error of the chain says why.
            After that PyTorch's memory and random numbers on this GPU are in disorder: begin again in a new process.

    Source: PyTorch's notes on CUDA, "Whole-network capture".
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device, so there is no CUDA graph: call the step itself, it computes the same")
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):  # PyTorch asks for this: a capture may not wait for the default stream
        for _ in range(warmup):
            step()
    here.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def _causal(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """Attention as transformers calls it: query, key and value are (batch, heads, tokens, numbers a head)."""
    if mask is not None or query.shape[2] != key.shape[2] or not getattr(module, "is_causal", True):
        raise ValueError('attention "causal" trains decoders, without mask or cache; set_attn_implementation("sdpa")')
    return sdpa_attention_forward(module, query, key, value, None, **options)
