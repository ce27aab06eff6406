"""Adapters and merged models as GGUF files, for llama.cpp and the programs around it. Used in lesson 13.

A GGUF file holds a model's settings and its tensors under llama.cpp's names: ``model.layers.3.self_attn.q_proj`` is
``blk.3.attn_q`` there. Only Llama-shaped models are written here; llama.cpp has scripts for the others.

Sources, in github.com/ggml-org/llama.cpp: ``convert_lora_to_gguf.py`` and ``conversion/llama.py`` for what is written,
``src/llama-adapter.cpp`` and ``src/llama-adapter.h`` for what is read, and how it is scaled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from lora_edu.core.config import INITS_THAT_KEEP_THE_BASE
from lora_edu.core.layer import scale_of
from lora_edu.core.parts import PREFIX
from lora_edu.core.peft_io import CONFIG_FILE, read_config, read_tensors, save_adapter
from lora_edu.core.state import injected_model, layers_in
from lora_edu.counting.meta import load_config, meta_model
from lora_edu.files import draft_of

# What a weight matrix may be written as, and what the file then calls itself. Vectors stay in float32.
WEIGHT_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
# What PEFT's files can hold and an adapter in GGUF cannot, by a part of its key; the first that is found counts.
NOT_IN_GGUF = {
    ".lora_magnitude_vector": "DoRA's magnitudes",
    ".lora_embedding_": "LoRA on the embedding",
    "lm_head.lora_": "LoRA on the output head, which llama.cpp lacks where it shares the embedding's weight",
    ".bias": "a trained bias",
    "": "neither A nor B: a whole weight from modules_to_save or of a vocabulary that has grown, for example",
}
WAY_OUT = (
    "llama.cpp takes A and B of the linear layers in the blocks only. Merge the adapter into its base with "
    "merge_and_unload(model) and write the result with save_model_gguf"
)
name_map = cache(gguf.get_tensor_name_map)


def save_adapter_gguf(
    adapter: nn.Module | str | os.PathLike, path: str | os.PathLike, base: Any = None, adapter_name: str = "default"
) -> Path:
    """Write a LoRA adapter as a GGUF file, which llama.cpp loads beside its base: ``llama-cli -m BASE --lora PATH``.

    The file has one alpha, and llama.cpp scales each layer by alpha / rank. The alpha written is the one that gives
    the scale as it acts: lora_alpha · √r for rsLoRA. Where layers differ in it, B takes the rest of the factor.

    Args:
        adapter: a model with the adapter in it, or a folder in PEFT's format.
        base: the base of a folder: its config, a folder or file with it, or a name that ``load_config`` knows. Default:
            the name that is in the folder.
        adapter_name: which of a model's adapters.

    Returns:
        The path.

    Raises:
        ValueError: if the base is not Llama-shaped, the adapter does not fit it, or the adapter has what such a file
            cannot hold. Nothing is written then.
    """
    if isinstance(adapter, nn.Module):
        with TemporaryDirectory() as saved:
            save_adapter(adapter, saved, adapter_name)
            return save_adapter_gguf(saved, path, base or injected_model(adapter).config)
    folder = Path(adapter)
    settings: Any = read_config(folder)
    if settings.peft_type != "LORA":
        raise ValueError(f"peft_type={settings.peft_type!r} is not LoRA; {WAY_OUT}")
    if (start := settings.init_lora_weights) not in INITS_THAT_KEEP_THE_BASE:
        raise ValueError(f"init_lora_weights={start!r}: A and B are for a base that this start has changed; {WAY_OUT}")
    config = llama_config(base or base_named_in(folder))
    factors = factors_in(folder, config)
    # llama.cpp divides by the rank again, whatever the rank was divided by in training.
    alphas = {
        name: len(a) * scale_of(settings.alpha_of(name), len(a), settings.use_rslora)
        for name, (a, _) in factors.items()
    }
    alpha = next(filter(None, alphas.values()), 1.0)  # not 0: llama.cpp takes that for "no alpha", and scales by 1
    with gguf_writer(Path(path)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, (a, b) in factors.items():
            weight = gguf_name(f"{name}.weight", config)
            writer.add_tensor(f"{weight}.lora_a", array_of(a))
            writer.add_tensor(f"{weight}.lora_b", array_of(in_llama_order(name, b, config)) * (alphas[name] / alpha))
    return Path(path)


def save_model_gguf(
    model: nn.Module, path: str | os.PathLike, base_file: str | os.PathLike, weight_type: str = "f16"
) -> Path:
    """Write a merged model as a GGUF file. Tokenizer, chat template and settings are those of the base's GGUF file.

    Args:
        model: the model after ``merge_and_unload``.
        base_file: a GGUF file of the same base, of any precision, such as ``require_gguf("smollm2-135m")``.
        weight_type: of the matrices: ``"f32"``, ``"f16"`` or ``"q8_0"``. For 4 bits, hand the result to llama.cpp's
            ``llama-quantize``.

    Returns:
        The path.

    Raises:
        ValueError: if the model is not Llama-shaped, still has adapters, or has other tensors than the base's file,
            for example rows for added tokens. Nothing is written then.
    """
    if weight_type not in WEIGHT_TYPES:
        raise ValueError(f"weight_type={weight_type!r}: expected one of {', '.join(map(repr, WEIGHT_TYPES))}")
    if layers_in(model):
        raise ValueError("the model still has adapters: call merge_and_unload(model), or use save_adapter_gguf")
    config = llama_config(model.config)
    tensors = {gguf_name(name, config): in_llama_order(name, t, config) for name, t in model.named_parameters()}
    reader = gguf.GGUFReader(base_file)
    ours = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    theirs = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors}
    # A merged model may have a head of its own where its base shares the embedding's weight.
    theirs.setdefault("output.weight", ours.get("output.weight", ()))
    if wrong := [name for name in sorted(ours | theirs) if ours.get(name, ()) != theirs.get(name, ())]:
        raise ValueError(
            f"{base_file} is no file of this model's base: {wrong[0]!r} has shape {theirs.get(wrong[0])} there and "
            f"{ours.get(wrong[0])} here; give the file of its base, or save the model with save_pretrained and let "
            "llama.cpp's convert_hf_to_gguf.py convert it"
        )
    with gguf_writer(Path(path)) as writer:
        for field in reader.fields.values():
            if not field.name.startswith(("GGUF.", gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE)):
                writer.add_key_value(field.name, field.contents(), *field.types)
        writer.add_file_type(WEIGHT_TYPES[weight_type])
        for name, tensor in tensors.items():
            number = gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else weight_type.upper()]
            writer.add_tensor(name, gguf.quantize(array_of(tensor), number), raw_dtype=number)
    return Path(path)


def permuted(rows: Tensor, heads: int) -> Tensor:
    """The rows of q or k in llama.cpp's order, which the rotary embedding needs.

    In transformers it turns entries i and i + d/2 of a head of width d as a pair, in llama.cpp's Llama the neighbours
    2i and 2i + 1. So the two halves of each head are interleaved: 0 1 2 3 becomes 0 2 1 3. q and k stay aligned with
    each other, and scores are as before. ΔW = B A has the rows of B, so that for an adapter only B is permuted.

    Shapes:
        rows: (heads · d, …), as the result.

    Source: ``LlamaModel.permute`` in llama.cpp's ``conversion/llama.py``.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def in_llama_order(name: str, rows: Tensor, config: Any) -> Tensor:
    """``permuted`` for the layers that need it; others as they are."""
    if ".q_proj" in name:
        return permuted(rows, config.num_attention_heads)
    if ".k_proj" in name:
        return permuted(rows, config.num_key_value_heads)
    return rows


def factors_in(folder: Path, config: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (A, B)} of an adapter's folder, if they fit the base and there is nothing else.

    Raises:
        ValueError: otherwise.
    """
    tensors = read_tensors(folder)
    for key in tensors:
        if not key.endswith((".lora_A.weight", ".lora_B.weight")) or "lm_head." in key:
            what = next(what for part, what in NOT_IN_GGUF.items() if part in key)
            raise ValueError(f"{key!r} is {what}; {WAY_OUT}")
    base = {name: weight.shape for name, weight in meta_model(config, "lm").named_parameters()}
    factors = {}
    for layer in sorted({key.rsplit(".lora_", 1)[0] for key in tensors}):
        a, b = (tensors.get(f"{layer}.lora_{factor}.weight", torch.empty(0, 0)) for factor in "AB")
        name = layer.removeprefix(PREFIX)
        if base.get(f"{name}.weight") != (len(b), a.shape[1]) or len(a) != b.shape[1]:
            raise ValueError(
                f"A {tuple(a.shape)} and B {tuple(b.shape)} of {name!r} do not fit the base, where its weight has "
                f"shape {tuple(base.get(f'{name}.weight', ()))}; check that base names the model that the adapter was "
                "trained on, and that the file is complete"
            )
        factors[name] = a, b
    return factors


def base_named_in(folder: Path) -> str:
    """The base that an adapter's config names."""
    named = json.loads((folder / CONFIG_FILE).read_bytes()).get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{folder / CONFIG_FILE} names no base: give base, for example base='smollm2-135m'")
    return named


def llama_config(base: Any) -> Any:
    """The base's config, if llama.cpp reads the model as a plain Llama.

    Raises:
        ValueError: if it does not, or there is no such config.
    """
    config = load_config(base)
    if config.model_type != "llama":
        raise ValueError(
            f"model_type={config.model_type!r}: only Llama-shaped models, of the type 'llama', are written here; "
            "llama.cpp's convert_hf_to_gguf.py and convert_lora_to_gguf.py read the folders of others"
        )
    return config


def gguf_name(name: str, config: Any) -> str:
    """llama.cpp's name of a Llama's tensor; one that it does not know stays as it is."""
    return name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers).get_name(name, (".weight", ".bias")) or name


def array_of(tensor: Tensor) -> np.ndarray:
    """A tensor's values in float32."""
    return tensor.detach().float().cpu().contiguous().numpy()


@contextmanager
def gguf_writer(path: Path) -> Iterator[gguf.GGUFWriter]:
    """A writer for a Llama's file, which is put in place whole when the block ends, or not at all."""
    with draft_of(path) as draft:
        writer = gguf.GGUFWriter(draft, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
