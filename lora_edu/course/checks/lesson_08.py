"""Checks of lesson 08: the scale in a config (A1) and another tool's format (B1)."""

import json
import math
import random
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_edu.course.checks.report import Report, Wrong, run_steps

PREFIX = "base_model.model."


def scale_of(candidate: Callable[[Mapping[str, Any]], float], hint: int = 1) -> Report:
    """The scale that a saved config means. Exercise A1 of lesson 08."""

    def ask(fields: dict[str, Any], right: float) -> None:
        value = candidate(dict(fields))
        if value is None:
            raise Wrong("your function returns None", "What does its last line do?", "Begin it with return.")
        if not math.isclose(float(value), right, rel_tol=1e-9):
            raise Wrong(
                f"for {json.dumps(fields)} you give {float(value):.4g}; PEFT multiplies by {right:.4g}",
                "Which line of LoRALinear computes the scale, and with which values if a field is missing?",
                "lora_alpha / r, or lora_alpha / √r with use_rslora; r and lora_alpha are 8 where they are missing.",
            )

    def plain() -> None:
        for r, alpha in ((random.randint(3, 7), random.randint(9, 31)), (64, 16), (5, 1)):
            ask({"r": r, "lora_alpha": alpha, "use_rslora": False}, alpha / r)

    def rslora() -> None:
        r, alpha = random.choice([3, 5, 6, 7]), random.randint(9, 31)
        ask({"r": r, "lora_alpha": alpha, "use_rslora": True}, alpha / math.sqrt(r))

    def defaults() -> None:
        r, alpha = random.randint(3, 7), random.randint(9, 31)
        ask({"r": r, "lora_alpha": alpha}, alpha / r)
        ask({"r": r}, 8 / r)
        ask({"lora_alpha": alpha}, alpha / 8)
        ask({"r": r, "use_rslora": True, "lora_dropout": 0.1}, 8 / math.sqrt(r))

    def like_peft() -> None:
        import peft

        for _ in range(4):
            options: dict[str, Any] = {"r": random.randint(2, 9), "lora_alpha": random.randint(1, 40)}
            options["use_rslora"] = random.random() < 0.5
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model: Any = peft.get_peft_model(
                    nn.Sequential(nn.Linear(11, 10)), peft.LoraConfig(target_modules=["0"], **options)
                )
            ask(options, model.base_model.model[0].scaling["default"])

    steps = [
        ("the scale is lora_alpha / r", plain),
        ("with use_rslora it is lora_alpha / √r", rslora),
        ("missing fields have PEFT's defaults", defaults),
        ("the same number as in PEFT's layers", like_peft),
    ]
    return run_steps("the scale in a config", steps, hint)


def draw_llama() -> Any:
    """A very small Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=23, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """{name: (out, in)} of the linear layers of the blocks."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name
    }


def kohya_file(shapes: Mapping[str, tuple[int, int]], r: int, alpha: float | None) -> dict[str, Tensor]:
    """Random tensors in the other dialect, for the given modules."""
    tensors = {}
    for name, (out_features, in_features) in shapes.items():
        flat = "lora_te_" + name.replace(".", "_")
        if alpha is not None:
            tensors[f"{flat}.alpha"] = torch.tensor(float(alpha))
        tensors[f"{flat}.lora_down.weight"] = torch.randn(r, in_features)
        tensors[f"{flat}.lora_up.weight"] = torch.randn(out_features, r)
    return tensors


def from_kohya(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """From kohya's keys to PEFT's files. Exercise B1 of lesson 08."""

    def draw(alpha: float | None) -> tuple[Any, dict[str, tuple[int, int]], dict[str, Tensor], int]:
        model, r = draw_llama(), random.randint(2, 5)
        shapes = linear_shapes(model)
        chosen = {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.2.mlp.up_proj"}
        some = {name: shape for name, shape in shapes.items() if name in chosen}
        return model, some, kohya_file(some, r, alpha), r

    def translate(alpha: float | None = 7.0) -> tuple[Any, dict, dict[str, Tensor], int, dict[str, Tensor], dict]:
        model, some, tensors, r = draw(alpha)
        answer = candidate(dict(tensors), list(linear_shapes(model)))
        if not isinstance(answer, tuple) or len(answer) != 2 or not all(isinstance(part, dict) for part in answer):
            raise Wrong(
                "your function returns no pair of dictionaries", "What does the task ask for?", "(tensors, fields)"
            )
        return model, some, tensors, r, *answer

    def keys() -> None:
        _, some, _, _, found, _ = translate()
        right = {f"{PREFIX}{name}.lora_{factor}.weight" for name in some for factor in "AB"}
        if strange := sorted(found.keys() - right):
            raise Wrong(
                f"you give the key {strange[0]!r}; PEFT's keys for this file are like {min(right)!r}",
                "Can the dots be got back from the underscores? q_proj has an underscore of its own.",
                "Flatten the modules' names, and look the flat name up: {flat name: name}.",
            )
        if lost := sorted(right - found.keys()):
            raise Wrong(f"the key {lost[0]!r} is missing", "Are all parts translated?", "lora_down is A, lora_up is B.")

    def factors() -> None:
        _, some, tensors, _, found, _ = translate()
        for name in some:
            for factor, part in (("A", "lora_down"), ("B", "lora_up")):
                theirs = tensors[f"lora_te_{name.replace('.', '_')}.{part}.weight"]
                ours = found[f"{PREFIX}{name}.lora_{factor}.weight"]
                if ours.shape != theirs.shape or not torch.equal(ours, theirs):
                    raise Wrong(
                        f"lora_{factor} of {name!r} is not the file's {part}: shape {tuple(ours.shape)}, "
                        f"expected {tuple(theirs.shape)} and the same values",
                        "Which factor reads the input, and is anything scaled or transposed on the way?",
                        "lora_down is A (r, in), lora_up is B (out, r), both unchanged; alpha belongs into the config.",
                    )

    def fields(alpha: float | None) -> Callable[[], None]:
        def run() -> None:
            *_, r, _, config = translate(alpha)
            right = {"peft_type": "LORA", "r": r, "lora_alpha": r if alpha is None else alpha}
            try:
                json.dumps(config)
            except TypeError as error:
                raise Wrong(
                    f"JSON cannot hold your fields: {error}",
                    "Is one of them a tensor or a set?",
                    "float(tensor) makes a number of a tensor without dimensions; use lists, not sets.",
                ) from None
            for field, value in right.items():
                if config.get(field) != value:
                    raise Wrong(
                        f"{field} is {config.get(field)!r}, expected {value!r}"
                        + (" (the file has no alpha)" if alpha is None and field == "lora_alpha" else ""),
                        "Where does the file say it: in a tensor, or in a shape?",
                        "r is lora_down's first dimension, lora_alpha the alpha tensor; without one, alpha is r.",
                    )

        return run

    def stranger() -> None:
        model, _, tensors, r = draw(7.0)
        tensors |= kohya_file({"model.layers.0.self_attn.query": (12, 12)}, r, 7.0)
        try:
            candidate(tensors, list(linear_shapes(model)))
        except ValueError:
            return
        except KeyError as error:
            raise Wrong(
                f"a name that fits no module raises KeyError: {error}",
                "What will the reader of this message know?",
                "Look first, and raise ValueError with the key.",
            ) from None
        raise Wrong(
            "a name that fits no module, lora_te_model_layers_0_self_attn_query, goes through without a word",
            "What would be loaded for it?",
            "raise ValueError if the flat name is not among the model's.",
        )

    def peft_loads() -> None:
        import peft

        model, some, tensors, r, found, config = translate()
        ids = torch.randint(0, 23, (2, 5))
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_file(
                {key: tensor.contiguous() for key, tensor in found.items()}, Path(folder) / "adapter_model.safetensors"
            )
            (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
            # A copy for PEFT: it changes the model that it is given.
            theirs: Any = draw_llama()
            theirs.load_state_dict(model.state_dict())
            loaded = peft.PeftModel.from_pretrained(theirs, folder)
        adapted = [name for name, module in theirs.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)]
        if sorted(adapted) != sorted(some):
            raise Wrong(
                f"with your target_modules PEFT adapts {len(adapted)} layers, the file is for {len(some)}",
                "Which layers does a target such as 'q_proj' mean?",
                "Give the full names of the file's modules.",
            )
        with torch.no_grad():
            for name in some:
                flat = f"lora_te_{name.replace('.', '_')}"
                update = tensors[f"{flat}.lora_up.weight"] @ tensors[f"{flat}.lora_down.weight"]
                model.get_submodule(name).weight += 7.0 / r * update
            right, answer = model(ids).logits, loaded(ids).logits
        if not torch.allclose(answer, right, rtol=1e-3, atol=1e-4):
            raise Wrong(
                "PEFT loads your files, but the answers are not those of W + alpha / r · up · down",
                "Is alpha counted twice, or not at all?",
                "Leave the tensors as they are, and put r and lora_alpha into the fields.",
            )

    steps = [
        ("the keys are PEFT's", keys),
        ("A and B are the file's down and up", factors),
        ("the fields hold r and alpha, and JSON can hold them", fields(7.0)),
        ("without an alpha tensor, alpha is r", fields(None)),
        ("a name that fits no module is refused", stranger),
        ("PEFT loads it, with the right answers", peft_loads),
    ]
    return run_steps("from another tool's format", steps, hint)
