"""The checks of lesson 14: bits for each weight (A1), two codes in a byte (B1), better levels (B2), which layers
suffer (C1); in the lesson itself NF4's levels, and the product that dequantises twice."""

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.course.checks.tools import (
    changed,
    close,
    close_number,
    is_tensor,
    known_slip,
    need_number,
    need_several,
    normal,
    off_by,
    shape_or_type,
    values_of,
    with_note,
)
from lora_edu.lab.bases import load_base
from lora_edu.nf4 import NF4_CODE, NF4State, dequantize_nf4, quantize_nf4, relative_error, rounded_to_code

BETTER = 0.995  # of NF4's error: a gain that is no accident of the layer


def need_levels(code: Any) -> Tensor:
    """Sixteen rising numbers within [−1, 1]."""
    if not is_tensor(code, (16,)):
        raise Wrong(
            f"you return {shape_or_type(code)}: expected a tensor of shape (16,)",
            "How many numbers do four bits tell apart, zero included?",
            "torch.cat the levels below zero, zero, and those above.",
        )
    code = code.detach().float()
    if not torch.isfinite(code).all():
        raise Wrong(
            "some levels are infinite or not a number",
            "At which probability is the normal distribution's quantile infinite?",
            "Stay away from the probabilities 0 and 1.",
        )
    if not (code.diff() > 0).all():
        raise Wrong(
            "the levels do not rise from each to the next",
            "In which order do your pieces stand, and does a level occur twice?",
            "Sort them: code.sort().values; each level occurs once.",
        )
    if code.abs().max() > 1 + 1e-6:
        raise Wrong(
            f"the levels reach from {code.min():.3f} to {code.max():.3f}: expected within −1 and 1",
            "A block is divided by its largest magnitude. What is then its largest number?",
            "Divide all levels by the largest.",
        )
    return code


def nf4_levels(candidate: Callable[[], Any], hint: int = 1) -> Report:
    """NF4's sixteen levels. In lesson 14 itself."""

    def rising() -> None:
        need_levels(candidate())

    def ends() -> None:
        code = candidate().float()
        if abs(code[0] + 1) > 1e-6 or abs(code[-1] - 1) > 1e-6:
            raise Wrong(
                f"the levels end at {code[0]:.4f} and {code[-1]:.4f}: expected −1 and 1",
                "By what do you divide?",
                "Divide all of them by the largest level.",
            )
        if not (code == 0).any():
            raise Wrong(
                "zero is no level, so a weight of zero does not stay zero",
                "Which piece is neither above nor below?",
                "Put torch.zeros(1) between the two sides.",
            )

    def sides() -> None:
        code = candidate().float()
        above, below = int((code > 0).sum()), int((code < 0).sum())
        if (above, below) != (8, 7):
            raise Wrong(
                f"{above} levels lie above zero and {below} below: expected eight and seven",
                "How many numbers does linspace give with both ends, and how many are left without 1/2?",
                "linspace(0.9677083, 0.5, 9)[:-1] for those above, and 8 in place of 9 below.",
            )

    def published() -> None:
        code = candidate().float()
        steps = torch.cat([torch.linspace(-1, 0, 8), torch.linspace(0, 1, 9)[1:]])
        slips = [
            (levels_to(1 - 1 / 32), "you stop half of one of 16 levels inside; it is the mean of that and 1 of 15"),
            (levels_to(1 - 1 / 30), "you stop half of one of 15 levels inside; it is the mean of that and 1 of 16"),
            (steps, "these are equal steps, not steps equal in probability"),
        ]
        if not close(code, NF4_CODE, rtol=0, atol=1e-5):
            note = known_slip(code, slips, lambda a, b: close(a, b, rtol=0, atol=1e-4))
            raise Wrong(
                with_note(f"your levels lie up to {(code - NF4_CODE).abs().max():.3f} off the published ones", note),
                "At which probability do you begin, and are the steps equal in probability?",
                "Above: the quantiles of linspace(0.9677083, 0.5, 9)[:-1]; below: minus those with 8 in place of 9.",
            )

    steps = [
        ("sixteen rising levels within −1 and 1", rising),
        ("they end at −1 and 1, and zero is one of them", ends),
        ("eight above zero, seven below", sides),
        ("they are the published ones", published),
    ]
    return run_steps("NF4's levels", steps, hint)


def levels_to(end: float) -> Tensor:
    """The levels that begin at another probability."""
    above = torch.special.ndtri(torch.linspace(end, 0.5, 9)[:-1])
    below = -torch.special.ndtri(torch.linspace(end, 0.5, 8)[:-1])
    code = torch.cat([below, torch.zeros(1), above]).sort().values
    return code / code.max()


def four_bit_product(candidate: Callable[[Tensor, NF4State], Any], hint: int = 1) -> Report:
    """An autograd function that multiplies with a stored weight and keeps only its bytes. In lesson 14 itself."""

    def drawn(*rows: int) -> tuple[Tensor, NF4State, Tensor]:
        out, width = 8 * random.randint(4, 6), 8 * random.randint(7, 9)
        state = quantize_nf4(normal(out, width), 64)
        return normal(*rows, width), state, dequantize_nf4(state)

    def product() -> None:
        x, state, weight = drawn(5)
        got = candidate(x, state)
        if not is_tensor(got, (5, len(weight))):
            raise Wrong(
                f"for 5 rows, your product is {shape_or_type(got)}: expected {(5, len(weight))}",
                "The weight is (out, in). Which way round does x meet it?",
                "x @ dequantize_nf4(state).T",
            )
        if not close(got, x @ weight.T):
            raise Wrong(
                f"your product is off by {off_by(got, x @ weight.T):.0%}",
                "Is the weight that you multiply with the dequantised one?",
                "x @ dequantize_nf4(state).T",
            )

    def gradient() -> None:
        for rows in ((4,), (2, 3)):
            x, state, weight = drawn(*rows)
            x.requires_grad_(True)
            y = candidate(x, state)
            grad = normal(*y.shape)
            y.backward(grad)
            if x.grad is None or not close(x.grad, grad @ weight):
                found = "missing" if x.grad is None else f"off by {off_by(x.grad, grad @ weight):.0%}"
                raise Wrong(
                    f"for x of {len(rows) + 1} dimensions, the gradient of x is {found}",
                    "y = x Wᵀ. What does the gradient of y, (..., out), meet to become (..., in)?",
                    "grad @ dequantize_nf4(ctx.state): W itself, not its transpose.",
                )

    def forgets() -> None:
        x, state, weight = drawn(3)
        x.requires_grad_(True)
        kept: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = candidate(x, state)
        own = {tensor.data_ptr() for tensor in vars(state).values() if isinstance(tensor, Tensor)}
        for tensor in [*kept, *noted_tensors(y.grad_fn)]:
            if tensor.numel() >= weight.numel() and tensor.data_ptr() not in own:
                raise Wrong(
                    f"{tensor.nbytes:,} bytes are kept for the backward pass, as many numbers as the weight has",
                    "What is noted on ctx, or saved for backward, that could be made again?",
                    "Keep the state: ctx.state = state; dequantise again in backward.",
                )
            if tensor.data_ptr() == x.data_ptr():
                raise Wrong(
                    "x is kept for the backward pass",
                    "Which gradient would need x, and is the weight trained?",
                    "The gradient of x needs only grad and the weight: do not save x.",
                )

    steps = [
        ("x Wᵀ with the dequantised weight", product),
        ("the gradient of x, in any number of dimensions", gradient),
        ("only the stored bytes are kept in between", forgets),
    ]
    return run_steps("product with a weight in four bits", steps, hint)


def noted_tensors(node: Any) -> Iterator[Tensor]:
    """What an autograd function noted on its ctx."""
    waiting = list(getattr(node, "__dict__", {}).values())
    while waiting:
        each = waiting.pop()
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, tuple | list):
            waiting += each
        elif isinstance(each, dict):
            waiting += each.values()


def bits_per_weight(candidate: Callable[[int, int | None], Any], hint: int = 1) -> Report:
    """How many bits a stored weight takes. Exercise A1 of lesson 14."""

    def asked(block: int, double: int | None) -> float:
        return need_number(
            candidate(block, double), "What is counted, and in which unit?", "Return the number of bits."
        )

    def single() -> None:
        block = random.choice([32, 48, 96, 128])
        got, right = asked(block, None), 4 + 32 / block
        slips = [
            (4.0, "the scales are missing"),
            (32 / block, "the four bits of the weight itself are missing"),
            (4 + 4 / block, "a float32 has four bytes, which are 32 bits"),
            (4 + 16 / block, "that is a scale of 16 bits"),
            (right / 8, "these are bytes"),
        ]
        if not close_number(got, right):
            raise Wrong(
                with_note(f"in blocks of {block} you count {got:g} bits", known_slip(got, slips)),
                "What does a block store besides four bits for each weight?",
                "4 + 32 / block_size",
            )

    def double() -> None:
        block, group = random.choice([32, 48, 96, 128]), random.choice([100, 200, 256, 500])
        got, right = asked(block, group), 4 + 8 / block + 32 / (block * group)
        slips = [
            (4 + 32 / block, "the scales have 8 bits now, not 32"),
            (4 + 8 / block, "the scale of the scales is missing"),
            (4 + 8 / block + 32 / group, f"one float32 serves {group} scales, which are {block * group} weights"),
            (4 + 8 / block + 8 / (block * group), "the scale of the scales is a float32"),
            (4 + 32 / block + 8 / (block * group), "8 and 32 bits have changed places"),
        ]
        if not close_number(got, right):
            raise Wrong(
                with_note(
                    f"in blocks of {block}, {group} scales a group, you count {got:g} bits", known_slip(got, slips)
                ),
                "How many weights share a scale, and how many share the scale of the scales?",
                "4 + 8 / block_size + 32 / (block_size * double_block)",
            )

    def qlora() -> None:
        got = asked(64, 256)
        if round(got, 3) != 4.127:
            raise Wrong(f"QLoRA's own setting gives {got:g} bits", "64 and 256: which is which?", "It is 4.127.")

    steps = [
        ("a float32 scale for each block", single),
        ("scales in eight bits, with a scale of their own", double),
        ("4.127 bits in QLoRA's setting", qlora),
    ]
    return run_steps("bits for each weight", steps, hint)


def quantise(candidate: Callable[[Tensor, Tensor, int], Any], hint: int = 1) -> Report:
    """From a weight to bytes and scales. Exercise B1 of lesson 14."""

    def drawn() -> tuple[Tensor, Tensor, int]:
        block = 2 * random.randint(6, 12)
        code = torch.rand(16).sort().values * 2 - 1
        code[0], code[-1] = -1, 1
        return torch.randn(random.randint(3, 5) * 2, block * random.randint(2, 3)), code, block

    def answer(weight: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
        given = weight.clone(), code.clone()
        pair = candidate(weight, code, block)
        packed, absmax = need_several(
            pair, 2, "two tensors, bytes and scales", "What does a stored weight consist of?", "return packed, absmax"
        )
        if not (torch.equal(weight, given[0]) and torch.equal(code, given[1])):
            raise Wrong(
                "the weight or the code is changed", "Which operation writes in place?", "Divide into a new tensor."
            )
        return packed, absmax

    def scales() -> None:
        weight, code, block = drawn()
        absmax, right = answer(weight, code, block)[1], weight.reshape(-1, block).abs().amax(1)
        if not is_tensor(absmax, right.shape):
            raise Wrong(
                f"the scales are {shape_or_type(absmax)}: expected {tuple(right.shape)}, one for each block of {block}",
                "How many blocks are there, and do the scales keep a dimension of 1?",
                "weight.reshape(-1, block_size).abs().amax(1)",
            )
        if not torch.equal(absmax, right):
            signed = torch.equal(absmax, weight.reshape(-1, block).amax(1))
            raise Wrong(
                with_note(
                    "the scales are not the blocks' largest magnitudes", "you left out the sign" if signed else ""
                ),
                "Is a block's largest number its largest magnitude?",
                "weight.reshape(-1, block_size).abs().amax(1)",
            )

    def unpacked(packed: Any, numbers: int) -> Tensor:
        if not is_tensor(packed, (numbers // 2,)) or packed.dtype != torch.uint8:
            kind = f"{shape_or_type(packed)} of {packed.dtype}" if isinstance(packed, Tensor) else shape_or_type(packed)
            raise Wrong(
                f"the bytes of {numbers} weights are {kind}: expected ({numbers // 2},) of torch.uint8",
                "How many weights fit into a byte?",
                "(first * 16 + second).to(torch.uint8), flat, first and second of each pair of neighbours.",
            )
        return torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()

    def bytes_of() -> None:
        weight, code, block = drawn()
        packed, _ = answer(weight, code, block)
        index = unpacked(packed, weight.numel())
        right = unpacked(quantize_nf4(weight, block, code=code).packed, weight.numel())
        if torch.equal(index, right):
            return
        half = len(right) // 2
        slips = [
            (right.view(-1, 2).flip(1).flatten(), "the first of each pair belongs in the upper half of its byte"),
            (
                torch.stack([right[:half], right[half:]], 1).flatten(),
                "you pair the two halves of the matrix, not neighbours",
            ),
            (quantised_down(weight, code, block), "you take the next level below, not the nearest"),
        ]
        wrong = (index != right).float().mean().item()
        raise Wrong(
            with_note(
                f"{wrong:.0%} of the weights have another code than the nearest", known_slip(index, slips, torch.equal)
            ),
            "Unpack your bytes and compare with (scaled - code).abs().argmin(-1). Where do they part?",
            "index = (scaled[..., None] - code).abs().argmin(-1).flatten(); packed = index[::2] * 16 + index[1::2]",
        )

    def zeros() -> None:
        weight, code, block = drawn()
        code[7] = 0
        code = code.sort().values
        weight.view(-1)[:block] = 0
        packed, _ = answer(weight, code, block)
        index = unpacked(packed, weight.numel())
        if not (code[index[:block]] == 0).all():
            raise Wrong(
                "in a block of zeros, the weights have another level than zero",
                "What is 0 / 0?",
                "Divide by 1 where the scale is 0: torch.where(absmax > 0, absmax, 1.0).",
            )
        if not torch.equal(
            index[block:], unpacked(quantize_nf4(weight, block, code=code).packed, weight.numel())[block:]
        ):
            raise Wrong("a block of zeros spoils the others", "Which blocks share a scale?", "Each block has its own.")

    steps = [
        ("one scale for each block, its largest magnitude", scales),
        ("two codes in a byte, the first in the upper half, each the nearest", bytes_of),
        ("a block of zeros gets the level zero", zeros),
    ]
    return run_steps("weights into bytes", steps, hint)


def quantised_down(weight: Tensor, code: Tensor, block: int) -> Tensor:
    """The number of the next level below each weight."""
    blocks = weight.reshape(-1, block)
    scaled = blocks / blocks.abs().amax(1, keepdim=True)
    return (torch.searchsorted(code, scaled.flatten().contiguous(), right=True) - 1).clamp(0)


def better_levels(candidate: Callable[[list[Tensor]], Any], hint: int = 1) -> Report:
    """Sixteen levels that beat NF4's on layers that they were not made from. Exercise B2 of lesson 14."""
    model, _ = load_base("minilm")
    layers = {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layer." in n}
    seen = [weight for name, weight in layers.items() if name.split(".layer.")[1][0] in "012"]
    hidden = {name: weight for name, weight in layers.items() if name.split(".layer.")[1][0] in "345"}

    def levels() -> Tensor:
        return need_levels(candidate([weight.clone() for weight in seen]))

    def rising() -> None:
        levels()

    def better() -> None:
        code = levels()
        for name in random.sample(list(hidden), 3):
            weight = hidden[name]
            got, nf4 = (relative_error(weight, rounded_to_code(weight, each)) for each in (code, NF4_CODE))
            if got >= BETTER * nf4:
                same = torch.allclose(code, NF4_CODE, atol=1e-4)
                raise Wrong(
                    with_note(
                        f"on a hidden layer of MiniLM your levels err by {got:.4f}, NF4's by {nf4:.4f}; "
                        f"expected less than {BETTER * nf4:.4f}",
                        "these are NF4's levels" if same else "",
                    ),
                    "Where must a level lie, for the smallest squared error of the weights that share it?",
                    "Repeat: give each scaled weight its nearest level, then move each level to the mean of its "
                    "weights, weighted with the squared scale of the block. Keep −1 and 1.",
                )

    steps = [("sixteen rising levels within −1 and 1", rising), ("a smaller error than NF4's on hidden layers", better)]
    return run_steps("better levels", steps, hint)


def sensitivity(candidate: Callable[[nn.Module, list[str], Callable, Callable], Any], hint: int = 1) -> Report:
    """By how much the loss rises if one layer alone is rounded. Exercise C1 of lesson 14."""

    def drawn() -> tuple[
        nn.Module, list[str], Callable[[Tensor], Tensor], Callable[[nn.Module], float], dict[str, float]
    ]:
        torch.manual_seed(random.randint(0, 10**6))
        model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 3)).double()
        x, y = normal(40, 6), normal(40, 3)

        def loss(each: nn.Module) -> float:
            with torch.no_grad():
                return (each(x) - y).square().mean().item()

        def rounding(weight: Tensor) -> Tensor:
            return (weight * 3).round() / 3

        names, right, before = ["0", "2", "4"], {}, loss(model)
        for name in names:
            layer: Any = model.get_submodule(name)
            kept = layer.weight.detach().clone()
            layer.weight.data = rounding(kept)
            right[name] = loss(model) - before
            layer.weight.data = kept
        return model, names, rounding, loss, right

    def found() -> None:
        model, names, rounding, loss, right = drawn()
        before, everything = loss(model), drawn_together(model, names[1:], rounding, loss)
        got = candidate(model, names[1:], rounding, loss)
        if not isinstance(got, dict) or list(got) != names[1:]:
            raise Wrong(
                f"for the layers {names[1:]} you return {got!r:.60}",
                "What belongs to each name?",
                "Return a dictionary from each name, in the order given, to the rise of the loss.",
            )
        for i, name in enumerate(names[1:]):
            value = need_number(got[name], "Is it a number?", "Return plain floats.")
            slips = [
                (-right[name], "the sign is turned: a rise is positive"),
                (right[name] + before, "that is the loss, not its rise"),
                (everything[i], "the layers before it are still rounded"),
                (right[name] / before, "that is the rise as a share"),
                (0.0, "nothing was rounded when the loss was taken"),
            ]
            if not close_number(value, right[name], 1e-6):
                raise Wrong(
                    with_note(
                        f"layer {name!r}: you find {value:.4f}, expected {right[name]:.4f}", known_slip(value, slips)
                    ),
                    "Which weights are rounded when you take the loss, and what do you subtract?",
                    "Round this layer, take the loss, put the weight back; subtract the loss of the model as it came.",
                )

    def restored() -> None:
        model, names, rounding, loss, _ = drawn()
        parameters, before = dict(model.named_parameters()), values_of(model)
        candidate(model, names, rounding, loss)
        if off := changed(model, before):
            raise Wrong(
                f"afterwards {', '.join(off)} is not as it was",
                "Where do the old values wait, and is that a copy?",
                "kept = layer.weight.detach().clone(), and afterwards layer.weight.copy_(kept).",
            )
        if any(parameter is not parameters[name] for name, parameter in model.named_parameters()):
            raise Wrong(
                "afterwards the layer has another parameter than before; an optimizer would hold the old one",
                "Do you replace the parameter, or its values?",
                "Write into the parameter that is there: layer.weight.data = …, or copy_ under torch.no_grad().",
            )

    def exact() -> None:
        model, names, _, loss, _ = drawn()
        got = candidate(model, names, lambda weight: weight, loss)
        if any(abs(value) > 1e-12 or not math.isfinite(value) for value in got.values()):
            raise Wrong(
                "a rounding that changes nothing raises the loss",
                "What differs between your two losses besides the rounding?",
                "Take both with the same function, on the same data.",
            )

    steps = [
        ("the rise of the loss, one layer at a time", found),
        ("afterwards the model is as it was", restored),
        ("a rounding that changes nothing costs nothing", exact),
    ]
    return run_steps("which layers suffer", steps, hint)


def drawn_together(model: nn.Module, names: list[str], rounding: Callable, loss: Callable) -> list[float]:
    """The rise of the loss as layer after layer is rounded and stays so."""
    kept, before, rises = {}, loss(model), []
    for name in names:
        layer: Any = model.get_submodule(name)
        kept[name] = layer.weight.detach().clone()
        layer.weight.data = rounding(kept[name])
        rises.append(loss(model) - before)
    for name, weight in kept.items():
        model.get_submodule(name).weight.data = weight  # type: ignore[union-attr]
    return rises
