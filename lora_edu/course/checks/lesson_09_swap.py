"""Check of lesson 09: a hot-swap that fails cleanly (B2)."""

import contextlib
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.core.layer import LoRALinear
from lora_edu.course.checks.report import Report, Wrong, run_steps


def adapted_layers() -> tuple[dict[str, LoRALinear], dict[str, Tensor]]:
    """Layers of different shapes and ranks by place, and tensors under PEFT's keys that fit them."""
    layers, tensors = {}, {}
    for place, r in (("model.layers.0.q_proj", 3), ("model.layers.0.up_proj", 4), ("model.layers.1.q_proj", 2)):
        base = nn.Linear(random.randint(8, 11), random.randint(12, 15))
        layers[place] = LoRALinear(base, r=r, lora_alpha=5, init_lora_weights=False)
        for key, parameter in (("lora_A", layers[place].lora_A), ("lora_B", layers[place].lora_B)):
            tensors[f"base_model.model.{place}.{key}.weight"] = torch.randn_like(parameter)
    return layers, tensors


def state_of(layers: Mapping[str, LoRALinear]) -> list[Any]:
    """Values and scales, to compare before and after."""
    return [(la.lora_A.detach().clone(), la.lora_B.detach().clone(), la.scaling) for la in layers.values()]


def hot_swap(candidate: Callable[[dict[str, LoRALinear], dict[str, Tensor], float], None], hint: int = 1) -> Report:
    """Other values into the layers that are there. Exercise B2 of lesson 09."""

    def values() -> None:
        layers, tensors = adapted_layers()
        candidate(layers, tensors, 12)
        for place, layer in layers.items():
            for key in ("lora_A", "lora_B"):
                if not torch.equal(getattr(layer, key), tensors[f"base_model.model.{place}.{key}.weight"]):
                    raise Wrong(
                        f"{key} of {place} does not hold the new values",
                        "Which key of the file belongs to which tensor of the layer?",
                        'layer.lora_A.copy_(tensors[f"base_model.model.{place}.lora_A.weight"]), and so for lora_B.',
                    )

    def same_objects() -> None:
        layers, tensors = adapted_layers()
        before = {
            place: (la.lora_A, la.lora_B, la.lora_A.data_ptr(), la.lora_B.data_ptr()) for place, la in layers.items()
        }
        candidate(layers, tensors, 12)
        for place, layer in layers.items():
            a, b, place_a, place_b = before[place]
            if layer.lora_A is not a or layer.lora_B is not b:
                raise Wrong(
                    f"{place} has new parameters; an optimizer or a compiled model still holds the old ones",
                    "Which operation writes values into a tensor that exists?",
                    "Inside torch.no_grad(): layer.lora_A.copy_(values).",
                )
            if (layer.lora_A.data_ptr(), layer.lora_B.data_ptr()) != (place_a, place_b):
                raise Wrong(
                    f"the parameters of {place} point to other memory; a captured graph reads the old one",
                    "Does assigning to .data write values, or exchange the memory behind the parameter?",
                    "Inside torch.no_grad(): layer.lora_A.copy_(values).",
                )
            if not layer.lora_A.requires_grad:
                raise Wrong(
                    f"lora_A of {place} no longer requires a gradient",
                    "Is that for a swap to decide?",
                    "Leave requires_grad alone; torch.no_grad() is enough for copying.",
                )

    def scale() -> None:
        layers, tensors = adapted_layers()
        alpha = random.choice([7, 11, 13])
        candidate(layers, tensors, alpha)
        for place, layer in layers.items():
            if layer.scaling != alpha / layer.r:
                raise Wrong(
                    f"with lora_alpha={alpha}, {place} (r={layer.r}) has the scale {layer.scaling:.3f}; "
                    f"expected {alpha / layer.r:.3f}",
                    "What belongs to an adapter besides its tensors? Is the rank the same in every layer?",
                    "layer.scaling = lora_alpha / layer.r, for each layer.",
                )

    def damaged(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        last = list(tensors)[-1]
        longer = torch.cat([tensors[last], tensors[last]], dim=1)
        less = {key: value for key, value in tensors.items() if key != last}
        return {
            "a tensor of another rank": {**tensors, last: longer},
            "a missing tensor": less,
            "a tensor for a layer that is not there": {**tensors, last.replace("layers.1", "layers.7"): longer},
            "transposed tensors": {key: value.T.contiguous() for key, value in tensors.items()},
            "one row, which copy_ would spread over all": {**tensors, last: tensors[last][:1]},
        }  # fmt: skip

    def refuses() -> None:
        for words in damaged(adapted_layers()[1]):
            layers, tensors = adapted_layers()
            try:
                candidate(layers, damaged(tensors)[words], 12)
            except ValueError:
                continue
            except Exception as error:
                raise Wrong(
                    f"{words}: your function raises {type(error).__name__}, expected ValueError",
                    "Do you compare names and shapes yourself, before PyTorch stumbles over them?",
                    "Check that the keys are exactly the expected ones and each shape fits; else raise ValueError.",
                ) from None
            raise Wrong(
                f"{words}: your function accepts the file",
                "Which two sets of keys must be equal, and which shapes?",
                "Expected keys: two for each layer. Compare with set(tensors), then each shape; else raise ValueError.",
            )

    def untouched() -> None:
        for words in damaged(adapted_layers()[1]):
            layers, tensors = adapted_layers()
            before = state_of(layers)
            with contextlib.suppress(ValueError):
                candidate(layers, damaged(tensors)[words], 12)
            for place, (a, b, scaling), (a2, b2, scaling2) in zip(layers, before, state_of(layers), strict=True):
                if not (torch.equal(a, a2) and torch.equal(b, b2) and scaling == scaling2):
                    raise Wrong(
                        f"{words}: the file is refused, but {place} has changed already",
                        "In which order do you check and write?",
                        "Two loops: first check everything, then copy everything.",
                    )

    steps = [
        ("every tensor has its new values", values),
        ("in the same parameters", same_objects),
        ("with the new scale", scale),
        ("a file that does not fit is refused with ValueError", refuses),
        ("and then nothing has changed", untouched),
    ]
    return run_steps("hot-swap", steps, hint)
