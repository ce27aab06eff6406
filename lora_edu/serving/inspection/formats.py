"""Whose file is it, and which module do its tensors belong to? PEFT's, kohya's, diffusers', mlx-lm's. Lesson 08."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_edu.core.config import AdapterConfig
from lora_edu.core.parts import PREFIX
from lora_edu.serving.inspection.reading import Source

PEFT, KOHYA, DIFFUSERS, MLX, UNKNOWN = "PEFT", "kohya", "diffusers", "mlx-lm", "unknown"
KOHYA_PREFIXES = ("lora_unet_", "lora_te", "lora_transformer_", "lora_prior_", "lycoris_")
DIFFUSERS_PREFIXES = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "diffusion_model.")

# What ends a key: which factor it is, and, in files that no save_pretrained wrote, the adapter's name.
PEFT_KEY = re.compile(
    r"(?P<name>.+)\.(?P<kind>lora_(?:A|B|E|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<end>weight|bias))?$"
)
IMAGE_KEY = re.compile(
    r"(?P<name>.+?)[._](?P<kind>lora[._]down|lora[._]up|lora_A|lora_B|alpha|dora_scale)(?:\.weight)?$"
)
MLX_KEY = re.compile(r"(?P<name>.+)\.(?P<kind>lora_a|lora_b|m)$")
A_NAMES = ("lora_A", "lora_embedding_A", "lora_down", "lora.down")
B_NAMES = ("lora_B", "lora_embedding_B", "lora_up", "lora.up")


@dataclass
class Factors:
    """One adapted module: W + s · B A, as far as the file says.

    Attributes:
        A: (r, in), and B: (out, r), as PEFT has them; None if missing.
        scale: s as it acts; None if nothing says what it is.
        magnitude: DoRA's lengths of the rows.
    """

    A: Tensor | None = None
    B: Tensor | None = None
    scale: float | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """The rank that the file holds: of A if it is there, else of B."""
        if self.A is not None:
            return self.A.shape[0] if self.A.ndim else None
        return self.B.shape[1] if self.B is not None and self.B.ndim > 1 else None


@dataclass
class Adapter:
    """A file's tensors, sorted.

    Attributes:
        format: whose file it is, one of the names above.
        modules: {name of the module in the base: its factors}.
        others: {key without PEFT's prefix: tensor} of what is no factor: trained copies, biases, other methods.
        adapters: names of adapters in the keys themselves, where PEFT writes none.
        config: what ``adapter_config.json`` says, if lora_edu can read it as a method's config.
    """

    source: Source
    format: str
    modules: dict[str, Factors] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    config: AdapterConfig | None = None

    def at(self, name: str) -> Factors:
        """The factors of a module, new ones if it is met for the first time."""
        return self.modules.setdefault(name, Factors())


def sort_tensors(source: Source) -> Adapter:
    """Recognise a file by its keys and its config, and sort its tensors by module."""
    kind = recognise(source.tensors, source.fields or {})
    adapter = Adapter(source, kind)
    if kind in (KOHYA, DIFFUSERS):
        sort_image_model(adapter)
    elif kind == MLX:
        sort_mlx(adapter)
    else:
        sort_peft(adapter)
    adapter.modules = dict(sorted(adapter.modules.items(), key=lambda item: in_order(item[0])))
    return adapter


def in_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts ``layers.2`` before ``layers.10``."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def recognise(keys: Mapping[str, Tensor], fields: Mapping[str, Any]) -> str:
    """Whose file has such keys and such a config."""
    if "peft_type" in fields or any(key.startswith("base_model.") for key in keys):
        return PEFT
    if any(key.startswith(KOHYA_PREFIXES) for key in keys):
        return KOHYA
    if "lora_parameters" in fields or any(key.endswith((".lora_a", ".lora_b")) for key in keys):
        return MLX
    if any(key.startswith(DIFFUSERS_PREFIXES) and IMAGE_KEY.match(key) for key in keys):
        return DIFFUSERS
    return PEFT if any(PEFT_KEY.match(key) for key in keys) else UNKNOWN


def sort_peft(adapter: Adapter) -> None:
    """``base_model.model.`` + module + ``.lora_A.weight`` and so on. Scales are the config's matter."""
    names: dict[str, None] = {}
    for key, tensor in adapter.source.tensors.items():
        found = PEFT_KEY.match(key.removeprefix(PREFIX))
        if found is None or found["end"] == "bias":
            adapter.others[key.removeprefix(PREFIX)] = tensor
            continue
        if found["adapter"]:
            names[found["adapter"]] = None
        # Inside nn.MultiheadAttention PEFT's names hold a wrapper's: mha.base_layer.out_proj.
        put(adapter.at(found["name"].replace(".base_layer.", ".")), found["kind"], tensor)
    adapter.adapters = tuple(names)


def sort_image_model(adapter: Adapter) -> None:
    """kohya's and diffusers' files: alpha is a tensor of the module or stands in the metadata; else it is the rank."""
    alphas, said = {}, diffusers_settings(adapter.source.metadata)
    for key, tensor in adapter.source.tensors.items():
        found = IMAGE_KEY.match(key)
        if found is None:
            adapter.others[key] = tensor
        elif found["kind"] == "alpha":
            alphas[found["name"]] = float(tensor.float().mean())
        else:
            put(adapter.at(found["name"]), found["kind"], tensor)
    for name, factors in adapter.modules.items():
        part = name.partition(".")[0]  # diffusers may store one alpha for each part of the pipeline
        alpha = alphas.get(name, said.get(f"{part}.lora_alpha", said.get("lora_alpha", factors.rank)))
        known = alpha is not None and math.isfinite(alpha) and factors.rank
        factors.scale = alpha / factors.rank if known else None  # type: ignore[operator]


def diffusers_settings(metadata: Mapping[str, str]) -> dict[str, float]:
    """The numbers among the settings that newer diffusers put into a file's metadata: ``{"unet.lora_alpha": 16}``."""
    try:
        fields = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except json.JSONDecodeError:
        return {}
    return {key: value for key, value in fields.items() if type(value) in (int, float)} if type(fields) is dict else {}


def sort_mlx(adapter: Adapter) -> None:
    """mlx-lm's files: y + scale · (x a) b, so that A is a transposed; the scale is not divided by the rank."""
    parameters = (adapter.source.fields or {}).get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, Mapping) else None
    for key, tensor in adapter.source.tensors.items():
        found = MLX_KEY.match(key)
        if found is None:
            adapter.others[key] = tensor
            continue
        factors = adapter.at(found["name"])
        factors.scale = float(scale) if isinstance(scale, int | float) and math.isfinite(scale) else None
        if found["kind"] == "m":
            factors.magnitude = tensor
        elif found["kind"] == "lora_a":
            factors.A = tensor.mT if tensor.ndim > 1 else tensor
        else:
            factors.B = tensor.mT if tensor.ndim > 1 else tensor


def put(factors: Factors, kind: str, tensor: Tensor) -> None:
    """Put a tensor where its name says it belongs."""
    if kind.replace("lora_up", "lora.up") in B_NAMES:
        factors.B = tensor
    elif kind in A_NAMES:
        factors.A = tensor
    elif kind in ("lora_magnitude_vector", "dora_scale"):
        factors.magnitude = tensor
