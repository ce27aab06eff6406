"""Layers that cannot be adapted, found before anything is changed: not called, not here, or not readable.

An adapter works in its layer's ``forward``. Some modules read a layer's weight and never call the layer: the adapter
would then have no effect and no gradient, until merging suddenly gave it one. Lesson 11 meets such a layer.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lora_edu.core.matching import TRANSPARENT

# Kernels of the Mamba family that take these weights themselves, in training, where they are installed; without them,
# as on a CPU, the layers are called. PEFT too refuses ``out_proj`` in any case.
FUSED_KERNELS = ("mamba_inner_fn", "mamba_split_conv1d_scan_combined", "mamba2_split_conv1d_scan_combined")
# Called in their source, but only where the model is quantised.
READ_UNLESS_QUANTISED = (("FalconMambaMixer", "dt_proj"), ("JambaMambaMixer", "dt_proj"))
ENCODER_LINEARS = ("linear1", "linear2")
ABOUT_A_WEIGHT = ("device", "dtype", "is_cuda", "is_meta", "ndim", "requires_grad", "shape", "size")
EVERY_MODULE = ("_modules", "children", "get_submodule", "modules", "named_children", "named_modules")


def check_is_called(name: str, places: Sequence[tuple[nn.Module, str]]) -> None:
    """Raise if all owners of a layer are known to read its weight instead of calling it.

    Args:
        name: the layer's name in the model, for the message.
        places: (owner, attribute) wherever the layer is registered.

    Raises:
        ValueError: if so. ``nn.TransformerEncoderLayer`` can be told to call its layers; the message says how.
    """
    owners = [(owner, attribute) for owner, attribute in places if attribute not in TRANSPARENT]
    if owners and all(takes_fast_path(owner, attribute) for owner, attribute in owners):
        raise ValueError(
            f"{name!r}: in eval mode nn.TransformerEncoderLayer takes a fast path that reads the weight and skips "
            "the adapter; call torch.backends.mha.set_fastpath_enabled(False) first, or use exclude_modules"
        )
    if owners and all(reads_only_the_weight(type(owner), attribute) for owner, attribute in owners):
        raise ValueError(
            f"{name!r}: {type(owners[0][0]).__name__} reads this layer's weight and does not call the layer, so an "
            f"adapter in it would have no effect until it was merged; leave it out: exclude_modules=[{name!r}]"
        )


def takes_fast_path(owner: Any, attribute: str) -> bool:
    """Whether this is a linear layer of PyTorch's own encoder block, which in eval mode fuses it away.

    The block's settings must allow it as well: the fast path wants ``batch_first=True``, for example.
    """
    if type(owner).forward is not nn.TransformerEncoderLayer.forward or attribute not in ENCODER_LINEARS:
        return False
    attention = owner.self_attn
    allowed = attention.batch_first and attention._qkv_same_embed_dim and attention.in_proj_bias is not None
    fusable = owner.activation_relu_or_gelu and owner.norm1.eps == owner.norm2.eps and attention.num_heads % 2 == 0
    return bool(allowed and fusable and torch.backends.mha.get_fastpath_enabled())


def reads_only_the_weight(owner: Any, attribute: str) -> bool:
    """Whether a class's source reads ``self.x.weight``, never calls ``self.x(…)``, and hands ``self.x`` to nobody.

    Where there is no source to read, as for classes typed into a console, nothing is known: False.
    """
    if (owner.__name__, attribute) in READ_UNLESS_QUANTISED:
        return True
    seen: set[str] = set()
    for each in owner.__mro__:
        if each in (nn.Module, PreTrainedModel):
            break
        if (uses := uses_in(each)) is None:
            return False
        seen |= {use for name, use in uses if name in (attribute, "")}
    if "fused" in seen and (attribute == "out_proj" or find_spec("mamba_ssm") is not None):
        return True
    return "read" in seen and "called" not in seen


@cache
def uses_in(owner: type) -> frozenset[tuple[str, str]] | None:
    """What a class's own source does with its attributes: (x, "called"), (x, "read") or (x, "fused"); None if unknown.

    "read" is the weight as an operand, "called" is whatever else may lead to a call. The attribute "" is any of them.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    except (OSError, TypeError, SyntaxError):
        return None
    methods = [each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
    return frozenset(use for method in methods for use in uses_in_method(method))


def uses_in_method(method: ast.AST) -> Iterator[tuple[str, str]]:
    """The uses in one method. One that sets values up reads weights that others will call."""
    above = {id(child): node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    setting_up = any(word in getattr(method, "name", "") for word in ("init", "reset", "tie"))
    for node in ast.walk(method):
        if not isinstance(node, ast.Name) or node.id != "self":
            continue
        chain, parent = [], above[id(node)]  # self.x.weight.dtype: ["x", "weight", "dtype"]
        while isinstance(parent, ast.Attribute):
            chain.append(parent.attr)
            node, parent = parent, above[id(parent)]  # type: ignore[assignment]
        called = isinstance(parent, ast.Call) and parent.func is node
        if not chain or chain[0] in EVERY_MODULE:
            if not (setting_up or asks_about(parent)):
                yield "", "called"  # self is handed on, or all its modules are gone through
        elif chain[1:] in (["forward"], ["__call__"]) or (len(chain) == 1 and called):
            yield chain[0], "called"
        elif isinstance(getattr(node, "ctx", None), ast.Store | ast.Del):
            continue
        elif len(chain) == 1:
            if not asks_about(parent):
                yield chain[0], "called"  # handed on: whoever gets it may call it
        elif chain[1] == "weight" and not (setting_up or (chain[2:] and chain[2] in ABOUT_A_WEIGHT)):
            yield chain[0], "read"
            while not isinstance(parent, ast.stmt):
                if isinstance(parent, ast.Call) and getattr(parent.func, "id", None) in FUSED_KERNELS:
                    yield chain[0], "fused"
                parent = above[id(parent)]


def asks_about(parent: ast.AST) -> bool:
    """Whether an expression only looks at what stands in it: ``x is None``, ``hasattr(x, …)``."""
    words = ("hasattr", "id", "isinstance", "len", "super", "type")
    return isinstance(parent, ast.Compare) or (isinstance(parent, ast.Call) and getattr(parent.func, "id", "") in words)


def check_readable(pretrained: Any, weight: Tensor) -> None:
    """Raise unless the layers here can compute with the pretrained layer's weight."""
    dtype = weight.dtype
    if not (dtype.is_floating_point or dtype.is_complex) or dtype.itemsize == 1:
        raise TypeError(
            f"the {type(pretrained).__name__} keeps its weight packed as {dtype}, and the layers "
            "here read it as numbers: load the model unquantised, or adapt it with PEFT"
        )


def check_unsharded(model: nn.Module) -> None:
    """Raise if a model's weights are sharded over several processes: each would draw or load values of its own."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "the model's weights are sharded over several processes (FSDP): inject or load adapters before "
            "fully_shard(model)"
        )


def check_is_here(name: str, module: nn.Module, model: nn.Module) -> None:
    """Raise if a module's weights are not in memory while the model computes: they were offloaded to CPU or disk.

    A model that is on the meta device as a whole computes nothing: adapters may be counted there.
    """
    hooks = [getattr(each, "_hf_hook", None) for each in module.modules()]  # Accelerate's; some hold several
    offloaded = any(getattr(each, "offload", False) for hook in hooks for each in getattr(hook, "hooks", [hook]))
    alone = any(p.is_meta for p in module.parameters()) and not all(p.is_meta for p in model.parameters())
    if offloaded or alone:
        raise ValueError(
            f"{name!r} has its weight offloaded (on the meta device), so nothing could be placed and trained beside "
            "it: load the model without offloading, or choose modules that are here"
        )
