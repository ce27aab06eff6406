"""The checks of lesson 05 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from found import each_is_found, each_passes
from lora_edu.counting import lora_parameters
from lora_edu.course import checks

pytestmark = pytest.mark.graders


def right_numbers(lora: int, base: int, head: int = 0) -> tuple[int, int, float]:
    return lora + head, base + lora + head, 100 * (lora + head) / (base + lora + head)


def over_base(lora: int, base: int, head: int) -> tuple[int, int, float]:
    return lora + head, base + lora + head, 100 * (lora + head) / base


def fraction(lora: int, base: int, head: int) -> tuple[int, int, float]:
    return lora + head, base + lora + head, (lora + head) / (base + lora + head)


def rounded(lora: int, base: int, head: int) -> tuple[int, int, float]:
    return lora + head, base + lora + head, round(100 * (lora + head) / (base + lora + head), 2)


def frozen_head(lora: int, base: int, head: int) -> tuple[int, int, float]:
    return lora, base + lora + head, 100 * lora / (base + lora + head)


def one_head(lora: int, base: int, head: int) -> tuple[int, int, float]:
    return lora + head, base + lora, 100 * (lora + head) / (base + lora)


def three_heads(lora: int, base: int, head: int) -> tuple[int, int, float]:
    return lora + head, base + lora + 2 * head, 100 * (lora + head) / (base + lora + 2 * head)


def bare_base(lora: int, base: int, head: int) -> tuple[int, int, float]:
    return lora + head, base, 100 * (lora + head) / base


PEFT_NUMBERS = {
    "percent of the base": (over_base, "a language model", "you divide by the base alone"),
    "a fraction": (fraction, "a language model", "a fraction, not a percentage"),
    "rounded": (rounded, "a language model", "not rounded"),
    "all is the base": (bare_base, "a language model", "the base without the adapter"),
    "head does not train": (frozen_head, "a classifier", "the head trains, too"),
    "head counted once": (one_head, "a classifier", "both are counted"),
    "head counted three times": (three_heads, "a classifier", "inside the base already"),
}
PEFT_NUMBERS["two numbers"] = (lambda *given: right_numbers(*given)[:2], "a language model", "expected three numbers")


def in_a_list(lora: int, base: int, head: int) -> list:
    total = sum((lora, base, head))
    return [total - base, total, (1 - base / total) * 100]


test_other_numbers_pass = each_passes(checks.peft_numbers, {"a tuple": right_numbers, "a list": in_a_list})
test_peft_numbers_names_the_mistake = each_is_found(checks.peft_numbers, PEFT_NUMBERS)


def counter(
    matches: Callable[[str, str], bool] = lambda name, target: name == target or name.endswith("." + target),
    kinds: tuple[type, ...] = (nn.Linear, Conv1D, nn.Embedding),
    price: Callable[[nn.Module], int] = lambda module: sum(module.weight.shape),
    remove_duplicate: bool = True,
    refuse: bool = True,
) -> Callable[[nn.Module, int, list[str]], int]:
    """A right answer to B1 with places to go wrong."""

    def count(model: nn.Module, r: int, targets: list[str]) -> int:
        total = 0
        for name, module in model.named_modules(remove_duplicate=remove_duplicate):
            if isinstance(module, kinds) and any(matches(name, target) for target in targets):
                total += r * price(module)
        if not total and refuse:
            raise ValueError("no match")
        return total

    return count


def features(module: nn.Module) -> int:
    return module.in_features + module.out_features


COUNT_TARGETS = {
    "all layers are square": (counter(price=lambda m: 2 * m.weight.shape[1]), "own shape", "in_features"),
    "product of the shape": (counter(price=lambda m: m.weight.numel()), "own shape", "in_features"),
    "only A": (counter(price=lambda m: m.weight.shape[-1]), "own shape", "in_features"),
    "part of a name": (counter(lambda name, target: target in name), "whole name segments", "kv_proj"),
    "ending of a word": (counter(lambda name, target: name.endswith(target)), "whole name segments", "kv_proj"),
    "Conv1D left out": (counter(kinds=(nn.Linear, nn.Embedding)), "Conv1D", "ValueError"),
    "Conv1D has no in_features": (counter(price=features), "Conv1D", "AttributeError"),
    "bias counted": (
        counter(price=lambda m: sum(m.weight.shape) + (m.bias.numel() if getattr(m, "bias", None) is not None else 0)),
        "own shape",
        "biases are in it",
    ),
    "embeddings left out": (counter(kinds=(nn.Linear, Conv1D)), "embeddings", "you count"),
    "two names counted twice": (counter(remove_duplicate=False), "two names", "two names"),
    "the library's": (
        lambda model, r, targets: lora_parameters(model, r, targets),
        "own shape",
        "you call lora_parameters",
    ),
    "no error": (counter(refuse=False), "no match", "without a word"),
}
test_count_targets_names_the_mistake = each_is_found(partial(checks.count_targets, hint=3), COUNT_TARGETS)


def by_kind(model: nn.Module, r: int, targets: list[str]) -> int:
    seen, total = set(), 0
    for name, module in model.named_modules(remove_duplicate=False):
        if not f".{name}".endswith(tuple(f".{target}" for target in targets)) or id(module) in seen:
            continue
        seen.add(id(module))
        match module:
            case nn.Linear():
                total += r * (module.in_features + module.out_features)
            case nn.Embedding():
                total += r * (module.num_embeddings + module.embedding_dim)
            case Conv1D():
                total += r * (module.nx + module.nf)
    if not total:
        raise ValueError(f"nothing is called {targets}")
    return total


RIGHT_TARGETS = {"by shape": counter(), "by kind": by_kind}
test_other_counters_pass = each_passes(checks.count_targets, RIGHT_TARGETS)


def header_of(path: Path) -> tuple[int, dict]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return length, json.loads(data[8 : 8 + length])


def file_answer(path: Path, prefix: int = 8, skip: bool = True, numbers: str = "shapes") -> dict[str, int]:
    """A right answer to B2 with places to go wrong."""
    length, header = header_of(path)
    shapes = [entry["shape"] for name, entry in header.items() if not (skip and name == "__metadata__")]
    stored = path.stat().st_size - 8 - length
    parameters = {
        "shapes": sum(math.prod(shape) for shape in shapes),
        "four bytes": stored // 4,
        "bytes": stored,
        "tensors": len(shapes),
        "two sides": sum(shape[0] * shape[1] for shape in shapes) if numbers == "two sides" else 0,
        "only A": sum(math.prod(e["shape"]) for n, e in header.items() if "lora_A" in n),
    }[numbers]
    return {"parameters": parameters, "header_bytes": prefix + length, "tensor_bytes": stored}


def whole_file(path: Path) -> dict[str, int]:
    return {**file_answer(path), "tensor_bytes": path.stat().st_size}


def big_endian(path: Path) -> dict[str, int]:
    data = path.read_bytes()
    json.loads(data[8 : 8 + int.from_bytes(data[:8], "big")])
    return file_answer(path)


def with_the_library(path: Path) -> dict[str, int]:
    with safe_open(path, "pt") as file:
        numbers = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    return {**file_answer(path), "parameters": numbers}


def with_its_loader(path: Path) -> dict[str, int]:
    return {**file_answer(path), "parameters": sum(tensor.numel() for tensor in load_file(path).values())}


def only_parameters(path: Path) -> dict[str, int]:
    return {"parameters": file_answer(path)["parameters"]}


ADAPTER_FILE = {
    "length field forgotten": (lambda path: file_answer(path, prefix=0), "a float32 file", "the 8 bytes that hold"),
    "whole file as tensors": (whole_file, "a float32 file", "your tensor_bytes is"),
    "number of tensors": (lambda path: file_answer(path, numbers="tensors"), "a float32 file", "number of tensors"),
    "bytes as numbers": (lambda path: file_answer(path, numbers="bytes"), "a float32 file", "bytes, not numbers"),
    "only A": (lambda path: file_answer(path, numbers="only A"), "a float32 file", "your parameters is"),
    "big-endian": (big_endian, "a float32 file", "your code raised"),
    "the library's reader": (with_the_library, "a float32 file", "you call safe_open"),
    "the library's loader": (with_its_loader, "a float32 file", "you call load_file"),
    "two sides only": (lambda path: file_answer(path, numbers="two sides"), "no matrices", "raised IndexError"),
    "a tuple": (lambda path: tuple(file_answer(path).values()), "a float32 file", "you return a tuple"),
    "a float": (lambda path: {k: float(v) for k, v in file_answer(path).items()}, "a float32 file", "expected a whole"),
    "keys missing": (only_parameters, "a float32 file", "no entry 'header_bytes'"),
    "metadata as a tensor": (lambda path: file_answer(path, skip=False), "a metadata entry", "KeyError: 'shape'"),
    "four bytes a number": (lambda path: file_answer(path, numbers="four bytes"), "16-bit", "not every number has 4"),
}
test_adapter_file_names_the_mistake = each_is_found(checks.adapter_file, ADAPTER_FILE)


def by_offsets(path: Path) -> dict[str, int]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = max(entry["data_offsets"][1] for entry in header.values())
    return {
        "tensor_bytes": end,
        "header_bytes": path.stat().st_size - end,
        "parameters": int(sum(np.prod(entry["shape"]) for entry in header.values())),
    }


test_other_readers_pass = each_passes(checks.adapter_file, {"by shapes": file_answer, "by offsets": by_offsets})


def nearer_of_two(per_rank: dict[str, int], budget: int) -> dict[str, int]:
    below = {name: budget // each for name, each in per_rank.items()}
    return {
        name: max(1, below[name] + (budget - below[name] * each > (below[name] + 1) * each - budget))
        for name, each in per_rank.items()
    }


def one_rank_for_all(per_rank: dict[str, int], budget: int) -> dict[str, int]:
    return dict.fromkeys(per_rank, max(1, round(budget / max(per_rank.values()))))


MATCHED_RANKS = {
    "rounded down": (lambda p, b: {k: max(1, b // v) for k, v in p.items()}, "nearest rank", "misses the budget"),
    "rounded up": (lambda p, b: {k: math.ceil(b / v) for k, v in p.items()}, "nearest rank", "misses the budget"),
    "rank zero": (lambda p, b: {k: round(b / v) for k, v in p.items()}, "no rank below 1", "adapts nothing"),
    "not whole": (lambda p, b: {k: b / v for k, v in p.items()}, "fits exactly", "no whole number"),
    "one rank for all": (one_rank_for_all, "fits exactly", "misses the budget"),
    "powers of two": (
        lambda p, b: {k: 2 ** max(0, round(math.log2(b / v))) for k, v in p.items()},
        "fits exactly",
        "misses the budget",
    ),
}
MATCHED_RANKS |= {
    "a list": (lambda p, b: [max(1, round(b / v)) for v in p.values()], "fits exactly", "you return a list"),
    "a set left out": (
        lambda p, b: {k: max(1, round(b / p[k])) for k in list(p)[:1]},
        "fits exactly",
        "expected narrow",
    ),
}
RIGHT_RANKS = {
    "whole numbers only": lambda p, b: {k: max(1, (2 * b + v) // (2 * v)) for k, v in p.items()},
    "the nearer of two": nearer_of_two,
}
test_other_ranks_pass = each_passes(checks.matched_ranks, RIGHT_RANKS)
test_matched_ranks_names_the_mistake = each_is_found(checks.matched_ranks, MATCHED_RANKS)
