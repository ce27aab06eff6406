"""The checks of lesson 14 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from found import assert_random_state_kept, each_is_found, each_passes
from lora_edu.course import checks
from lora_edu.course.notebooks.stored import find_notebook, read
from lora_edu.nf4 import NF4_CODE, NF4State, dequantize_nf4

pytestmark = pytest.mark.graders
NOTEBOOK = "14_qlora"
Q = torch.special.ndtri


# NF4's levels


def levels(
    end: float = 0.9677083, above: int = 9, below: int = 8, zero: bool = True, ordered: bool = True, scaled: bool = True
) -> Callable[[], Tensor]:
    """The levels, with switches for their mistakes."""

    def made() -> Tensor:
        sides = [-Q(torch.linspace(end, 0.5, below)[:-1]), Q(torch.linspace(end, 0.5, above)[:-1])]
        code = torch.cat([sides[0], *([torch.zeros(1)] if zero else []), sides[1]])
        code = code.sort().values if ordered else code
        return code / code.max() if scaled else code

    return made


def literal() -> Tensor:
    quantiles = Q(torch.arange(17) / 17)
    code = (quantiles[:-1] + quantiles[1:]) / 2
    return code / code.max()


NF4_LEVELS = {
    "equation 4": (lambda: literal(), "rising", "infinite"),
    "without zero": (levels(zero=False), "rising", "(15,)"),
    "not sorted": (levels(ordered=False), "rising", "do not rise"),
    "not scaled": (levels(scaled=False), "rising", "Divide all levels by the largest"),
    "a list": (lambda: NF4_CODE.tolist(), "rising", "(16,)"),
    "sixteen equal steps": (lambda: torch.linspace(-1, 1, 16), "zero is one", "zero is no level"),
    "eight below": (levels(above=8, below=9), "eight above", "7 lie|7 levels lie above"),
    "half of one of 16": (levels(end=1 - 1 / 32), "published", "half of one of 16"),
    "half of one of 15": (levels(end=1 - 1 / 30), "published", "half of one of 15"),
    "equal steps on both sides": (
        lambda: torch.cat([torch.linspace(-1, 0, 8), torch.linspace(0, 1, 9)[1:]]), "published", "equal steps",
    ),
}  # fmt: skip

test_nf4_levels_names_the_mistake = each_is_found(checks.nf4_levels, NF4_LEVELS)


def with_distributions() -> Tensor:
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(0.5, 0.9677083, 9)[1:])
    below = normal.icdf(1 - torch.linspace(0.9677083, 0.5, 8)[:-1])
    return torch.cat([below / above[-1], torch.zeros(1), above / above[-1]])


test_nf4_levels_otherwise_written = each_passes(
    checks.nf4_levels, {"icdf": with_distributions, "by number": lambda: torch.tensor(NF4_CODE.tolist())}
)


# The product


def product(keep: str = "state", turned: bool = False, flat: bool = False, scale: float = 1.0) -> Callable:
    """The product as an autograd function, with switches for its mistakes."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, state: NF4State) -> Tensor:
            weight = dequantize_nf4(state)
            ctx.state = state
            if keep == "weight":
                ctx.weight = weight
            elif keep == "saved":
                ctx.save_for_backward(weight)
            elif keep == "x":
                ctx.save_for_backward(x)
            elif keep == "in a list":
                ctx.things = [{"w": weight}]
            return scale * x @ weight.T

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            weight = dequantize_nf4(ctx.state)
            if turned:
                return grad @ weight.T if weight.shape[0] == weight.shape[1] else grad.flip(-1) @ weight, None
            if flat:
                return torch.einsum("ro,oi->ri", grad.reshape(-1, len(weight)), weight)[: len(grad)], None
            return grad @ weight, None

    return lambda x, state: Product.apply(x, state)


def detached(x: Tensor, state: NF4State) -> Tensor:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, state: NF4State) -> Tensor:
            ctx.state = state
            return x @ dequantize_nf4(state).T

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
            return None, None

    return Product.apply(x, state)


PRODUCT = {
    "no transpose": (lambda x, state: x @ dequantize_nf4(state), "dequantised", "T|shapes"),
    "scaled": (product(scale=2.0), "dequantised", "off by 100%"),
    "the wrong gradient": (product(turned=True), "gradient", "grad @ dequantize_nf4"),
    "no gradient": (detached, "gradient", "missing"),
    "two dimensions only": (product(flat=True), "gradient", "shape|off by"),
    "the weight on ctx": (product("weight"), "in between", "as many numbers as the weight"),
    "the weight saved": (product("saved"), "in between", "as many numbers as the weight"),
    "the weight in a list": (product("in a list"), "in between", "as many numbers as the weight"),
    "x saved": (product("x"), "in between", "x is kept"),
    "F.linear": (
        lambda x, state: nn.functional.linear(x, dequantize_nf4(state)), "in between", "as many numbers as the weight",
    ),
}  # fmt: skip

test_four_bit_product_names_the_mistake = each_is_found(checks.four_bit_product, PRODUCT)


class SavedBytes(torch.autograd.Function):
    """Saves the stored tensors as autograd likes it, and computes in another way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: NF4State) -> Tensor:
        ctx.save_for_backward(state.packed, state.absmax)
        ctx.about = state
        return torch.einsum("...i,oi->...o", x, dequantize_nf4(state))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.einsum("...o,oi->...i", grad, dequantize_nf4(ctx.about)), None


def with_a_closure(x: Tensor, state: NF4State) -> Tensor:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return torch.matmul(x, dequantize_nf4(state).mT)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return torch.matmul(grad, dequantize_nf4(state))

    return Product.apply(x)


test_four_bit_product_otherwise_written = each_passes(
    checks.four_bit_product, {"saved": lambda x, state: SavedBytes.apply(x, state), "a closure": with_a_closure}
)


# Bits


BITS = {
    "no scales": (lambda block, double=None: 4.0, "float32 scale", "the scales are missing"),
    "scales only": (lambda block, double=None: 32 / block, "float32 scale", "four bits of the weight"),
    "bytes for bits": (lambda block, double=None: 4 + 4 / block, "float32 scale", "which are 32 bits"),
    "in bytes": (lambda block, double=None: (4 + 32 / block) / 8, "float32 scale", "these are bytes"),
    "text": (lambda block, double=None: f"{4 + 32 / block} bits", "float32 scale", "expected a number"),
    "double ignored": (lambda block, double=None: 4 + 32 / block, "eight bits", "not 32"),
    "one float32 a group of weights": (
        lambda block, double=None: 4 + (8 / block + 32 / double if double else 32 / block), "eight bits", "serves",
    ),
    "no second scale": (
        lambda block, double=None: 4 + (8 if double else 32) / block, "eight bits", "scale of the scales is missing",
    ),
    "8 and 32 swapped": (
        lambda block, double=None: 4 + 32 / block + (8 / (block * double) if double else 0), "eight bits", "changed",
    ),
}  # fmt: skip

test_bits_per_weight_names_the_mistake = each_is_found(checks.bits_per_weight, BITS)


def by_groups(block_size: int, double_block: int | None = None) -> float:
    if not double_block:
        return (block_size * 4 + 32) / block_size
    weights = block_size * double_block
    return (4 * weights + 8 * double_block + 32) / weights


def added_up(block_size: int, double_block: int | None = None) -> float:
    bits = 4.0
    bits += (32 if double_block is None else 8) / block_size
    return bits + (0 if double_block is None else 32 / block_size / double_block)


test_bits_per_weight_otherwise_written = each_passes(
    checks.bits_per_weight, {"by groups": by_groups, "added up": added_up}
)


# Into bytes


def quantise(
    signed: bool = False,
    guarded: bool = True,
    order: str = "upper first",
    nearest: bool = True,
    rows: bool = False,
    in_place: bool = False,
    dtype: torch.dtype = torch.uint8,
    keepdim: bool = False,
) -> Callable:
    """The function with switches for its mistakes."""

    def made(weight: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        blocks = weight.reshape(-1, block_size)
        absmax = blocks.amax(1) if signed else blocks.abs().amax(1)
        if rows:
            absmax = weight.abs().amax(1)
            blocks = weight
        divisor = torch.where(absmax > 0, absmax, 1.0) if guarded else absmax
        if in_place:
            blocks /= divisor[:, None]
            scaled = blocks
        else:
            scaled = blocks / divisor[:, None]
        distance = scaled[..., None] - code
        if not nearest:
            distance = torch.where(distance >= 0, distance, 9.0)
        index = distance.abs().argmin(-1).flatten()
        half = len(index) // 2
        packed = {
            "upper first": index[::2] * 16 + index[1::2],
            "lower first": index[1::2] * 16 + index[::2],
            "halves": index[:half] * 16 + index[half:],
            "one a byte": index,
        }[order]
        return packed.to(dtype), absmax[:, None] if keepdim else absmax

    return made


QUANTISE = {
    "signed": (quantise(signed=True), "largest magnitude", "left out the sign"),
    "one scale a row": (quantise(rows=True), "largest magnitude", "one for each block"),
    "a dimension kept": (quantise(keepdim=True), "largest magnitude", "dimension of 1"),
    "the weight divided": (quantise(in_place=True), "largest magnitude", "is changed"),
    "only the bytes": (lambda w, c, b: quantise()(w, c, b)[0], "largest magnitude", "two tensors"),
    "the first below": (quantise(order="lower first"), "two codes", "upper half"),
    "the halves paired": (quantise(order="halves"), "two codes", "not neighbours"),
    "one a byte": (quantise(order="one a byte"), "two codes", "How many weights fit"),
    "another type": (quantise(dtype=torch.int64), "two codes", "torch.int64"),
    "the next below": (quantise(nearest=False), "two codes", "next level below"),
    "0 / 0": (quantise(guarded=False), "zero", "0 / 0"),
}

test_quantise_names_the_mistake = each_is_found(checks.quantise, QUANTISE)


def with_bucketize(weight: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    blocks = weight.flatten().unfold(0, block_size, block_size)
    absmax = torch.linalg.vector_norm(blocks, ord=torch.inf, dim=1)
    scaled = (blocks / absmax.clamp(min=1e-30)[:, None]).contiguous()
    index = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2).to(torch.uint8).view(-1, 2)
    return (index[:, 0] << 4) | index[:, 1], absmax


def with_loops(weight: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    values, scales, numbers = weight.flatten().tolist(), [], []
    for start in range(0, len(values), block_size):
        block = torch.tensor(values[start : start + block_size])
        scales.append(block.abs().max())
        scaled = block / scales[-1] if scales[-1] else block
        numbers += [int((code - each).abs().argmin()) for each in scaled]
    return torch.tensor([16 * a + b for a, b in zip(numbers[::2], numbers[1::2], strict=True)]).byte(), torch.stack(
        scales
    )


test_quantise_otherwise_written = each_passes(checks.quantise, {"bucketize": with_bucketize, "loops": with_loops})


# Better levels


def lloyd(weights: list[Tensor], weighted: bool = True, rounds: int = 8, kept: bool = True) -> Tensor:
    blocks = torch.cat([weight.reshape(-1, 64) for weight in weights])[::16]
    absmax = blocks.abs().amax(1, keepdim=True)
    scaled, counts = (blocks / absmax).flatten(), torch.ones_like(blocks).flatten()
    if weighted:
        counts = absmax.square().expand_as(blocks).flatten()
    code = NF4_CODE.clone()
    for _ in range(rounds):
        index = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2)
        code = torch.zeros(16).index_add_(0, index, counts * scaled) / torch.zeros(16).index_add_(0, index, counts)
        if kept:
            code[0], code[-1] = -1, 1
    return code


def by_quantiles(weights: list[Tensor]) -> Tensor:
    """Equal numbers of weights for each level: many levels where the errors are small anyway."""
    scaled = torch.cat([w.reshape(-1, 64) / w.reshape(-1, 64).abs().amax(1, keepdim=True) for w in weights[:3]])
    return torch.quantile(scaled.flatten()[::10], torch.linspace(0, 1, 16))


LEVELS = {
    "NF4 itself": (lambda weights: NF4_CODE.clone(), "smaller error", "these are NF4's levels"),
    "equal steps": (lambda weights: torch.linspace(-1, 1, 16), "smaller error", "expected less than"),
    "equal numbers of weights": (by_quantiles, "smaller error", "expected less than"),
    "not scaled": (
        lambda weights: torch.quantile(weights[0].flatten()[:10000], torch.linspace(0, 1, 16)), "smaller error|rising",
        "expected less than|within",
    ),
    "fifteen": (lambda weights: lloyd(weights)[1:], "rising", "(16,)"),
    "falling": (lambda weights: lloyd(weights).flip(0), "rising", "do not rise"),
    "in the block's own size": (lambda weights: 3 * lloyd(weights), "rising", "reach from"),
}  # fmt: skip

test_better_levels_names_the_mistake = each_is_found(checks.better_levels, LEVELS)
test_better_levels_otherwise_written = each_passes(
    checks.better_levels,
    {"unweighted": lambda weights: lloyd(weights, weighted=False), "longer": lambda weights: lloyd(weights, rounds=20)},
)


# Which layers suffer


def sensitivity(
    sign: int = 1,
    subtract: bool = True,
    share: bool = False,
    put_back: str = "copy",
    rounded: bool = True,
    noise: float = 0,
) -> Callable:
    """The function with switches for its mistakes."""

    def made(model: nn.Module, names: list[str], rounding: Callable, loss: Callable) -> dict[str, float]:
        before, rises = loss(model), {}
        for name in names:
            layer: Any = model.get_submodule(name)
            kept = layer.weight.detach().clone()
            if put_back == "a new parameter":
                layer.weight = nn.Parameter(rounding(kept))
            elif rounded:
                layer.weight.data = rounding(kept)
            after = loss(model) + noise
            rises[name] = sign * ((after - before if subtract else after) / (before if share else 1))
            if put_back == "copy":
                layer.weight.data = kept
            elif put_back == "a new parameter":
                layer.weight = nn.Parameter(kept)
            elif put_back == "again":
                layer.weight.data = rounding(kept) if name == names[-1] else kept
        return rises

    return made


SENSITIVITY = {
    "the sign turned": (sensitivity(sign=-1), "one layer at a time", "sign is turned"),
    "the loss, not its rise": (sensitivity(subtract=False), "one layer at a time", "not its rise"),
    "a share": (sensitivity(share=True), "one layer at a time", "as a share"),
    "never put back": (sensitivity(put_back="never"), "one layer at a time", "still rounded"),
    "never rounded": (sensitivity(rounded=False), "one layer at a time", "nothing was rounded"),
    "a list": (lambda *a: list(sensitivity()(*a).values()), "one layer at a time", "dictionary"),
    "the last one left": (sensitivity(put_back="again"), "as it was", "is not as it was"),
    "a new parameter": (sensitivity(put_back="a new parameter"), "as it was", "another parameter"),
}

test_sensitivity_names_the_mistake = each_is_found(checks.sensitivity, SENSITIVITY)


def on_a_copy(model: nn.Module, names: list[str], rounding: Callable, loss: Callable) -> dict[str, float]:
    import copy

    rises = {}
    for name in names:
        other = copy.deepcopy(model)
        other.get_submodule(name).weight.data = rounding(other.get_submodule(name).weight.data)
        rises[name] = loss(other) - loss(model)
    return rises


def with_state_dict(model: nn.Module, names: list[str], rounding: Callable, loss: Callable) -> dict[str, float]:
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    base, rises = loss(model), {}
    for name in names:
        key = f"{name}.weight"
        model.load_state_dict(kept | {key: rounding(kept[key])})
        rises[name] = loss(model) - base
    model.load_state_dict(kept)
    return rises


test_sensitivity_otherwise_written = each_passes(
    checks.sensitivity, {"on a copy": on_a_copy, "by state dict": with_state_dict}
)


@pytest.mark.parametrize("name", ["bits_per_weight", "quantise", "better_levels", "sensitivity", "nf4_levels"])
def test_stubs_are_not_done_yet(name):
    def stub(*arguments):
        raise NotImplementedError("your code here")

    assert getattr(checks, name)(stub).status == "not done"


def test_a_stub_of_the_product_is_not_done_yet():
    def stub(x, state):
        raise NotImplementedError("your code here")

    assert checks.four_bit_product(stub).status == "not done"


def test_the_lessons_own_cells_pass():
    cells = {cell.id: cell.source for cell in read(find_notebook(NOTEBOOK)).cells}
    namespace: dict[str, Any] = {"torch": torch, "Q": Q, "dequantize_nf4": dequantize_nf4}
    exec(cells["c10"], namespace)
    exec(cells["c27"], namespace)
    assert checks.nf4_levels(namespace["levels"])
    assert checks.four_bit_product(namespace["product"])


def test_random_state_is_kept():
    assert_random_state_kept(checks.quantise, quantise())
