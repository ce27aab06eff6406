"""The checks of lesson 03 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from found import assert_found, by_class, each_is_found, each_passes
from lora_edu.course import checks

pytestmark = pytest.mark.graders


def forward(scale: Callable[[float, int], float]) -> Callable[..., torch.Tensor]:
    return lambda x, W, A, B, alpha, r: x @ W.T + scale(alpha, r) * (x @ A.T @ B.T)


FORWARD = {
    "no scale": (forward(lambda alpha, r: 1), "not scaled at all"),
    "r / alpha": (forward(lambda alpha, r: r / alpha), "upside down"),
    "alpha / sqrt r": (forward(lambda alpha, r: alpha / math.sqrt(r)), "rsLoRA"),
    "alpha alone": (forward(lambda alpha, r: alpha), "r is not"),
    "1 / r alone": (forward(lambda alpha, r: 1 / r), "lora_alpha is not"),
    "update forgotten": (forward(lambda alpha, r: 0), "it is zero"),
    "frozen path forgotten": (lambda x, W, A, B, alpha, r: alpha / r * (x @ A.T @ B.T), "no multiple of x Aᵀ Bᵀ"),
    "everything scaled": (lambda x, W, A, B, alpha, r: alpha / r * (x @ (W + B @ A).T), "no multiple of x Aᵀ Bᵀ"),
    "A and B not transposed": (lambda x, W, A, B, alpha, r: x @ W.T + alpha / r * (x @ A @ B), "your code raised"),
}
test_forward_names_the_mistake = each_is_found(checks.lora_forward, FORWARD, step="a batch of inputs")


RIGHT_FORWARD = {
    "F.linear": lambda x, W, A, B, alpha, r: F.linear(x, W) + F.linear(F.linear(x, A), B) * alpha / r,
    "one dense weight": lambda x, W, A, B, alpha, r: x @ (W + alpha / r * B @ A).T,
    "an index sum": lambda x, W, A, B, alpha, r: x @ W.T + torch.einsum("...i,ri,or->...o", x, A, B).mul(alpha / r),
    "x overwritten at the end": lambda x, W, A, B, alpha, r: (x @ W.T).add_(x.mul_(alpha / r) @ A.T @ B.T),
}
test_other_forwards_pass = each_passes(checks.lora_forward, RIGHT_FORWARD)


def test_a_forward_that_returns_nothing_is_told_so() -> None:
    assert_found(checks.lora_forward(lambda *given: None), "a batch", "gives NoneType")


def test_forward_without_leading_dimensions() -> None:
    wrong = lambda x, W, A, B, alpha, r: torch.atleast_2d(x) @ (W + alpha / r * B @ A).T  # noqa: E731
    assert_found(checks.lora_forward(wrong), "one input", "gives (1,")


class Right(nn.Module):
    """The right layer; each wrong one below changes one thing."""

    def __init__(self, base: Any, r: int = 8, lora_alpha: float = 8, lora_dropout: float = 0.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        out_features, in_features = base.weight.shape
        self.lora_A = nn.Parameter(base.weight.new_zeros(r, in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_alpha / r
        self.dropout = nn.Dropout(lora_dropout)
        self.change()

    def change(self) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scaling * (self.dropout(x) @ self.lora_A.T @ self.lora_B.T)


class NoScale(Right):
    def change(self) -> None:
        self.scaling = 1


class UpsideDown(Right):
    def change(self) -> None:
        self.scaling = self.r / self.lora_alpha


class SquareRoot(Right):
    def change(self) -> None:
        self.scaling = self.lora_alpha / math.sqrt(self.r)


class AlphaOnly(Right):
    def change(self) -> None:
        self.scaling = self.lora_alpha


class Dead(Right):
    def change(self) -> None:
        nn.init.zeros_(self.lora_A)


class SameRows(Right):
    def change(self) -> None:
        nn.init.ones_(self.lora_A)


class OtherStart(Right):
    def change(self) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)


class StandardNormal(Right):
    def change(self) -> None:
        nn.init.normal_(self.lora_A)


class WrongFan(Right):
    """As the lesson's 'Spot the bug': the initialisation reads the rank for the number of inputs."""

    def change(self) -> None:
        turned = torch.empty(self.lora_A.T.shape)
        self.lora_A.data.copy_(nn.init.kaiming_uniform_(turned, a=math.sqrt(5)).T)


class ForReLU(Right):
    def change(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A)


class Xavier(Right):
    def change(self) -> None:
        nn.init.xavier_uniform_(self.lora_A)


class NeverNegative(Right):
    def change(self) -> None:
        nn.init.uniform_(self.lora_A, 0, 2 / math.sqrt(self.lora_A.shape[1]))


class Gaussian(Right):
    """PEFT's other start."""

    def change(self) -> None:
        nn.init.normal_(self.lora_A, std=1 / self.r)


class Uniform(Right):
    def change(self) -> None:
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        self.lora_A.data = (2 * torch.rand_like(self.lora_A) - 1) * bound


class AsLinear(Right):
    def change(self) -> None:
        rank, inputs = self.lora_A.shape
        self.lora_A.data.copy_(nn.Linear(inputs, rank, bias=False).weight)


class FunctionalForward(Right):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(F.dropout(x, self.dropout.p, self.training), self.lora_A)
        return torch.add(self.base(x), F.linear(h, self.lora_B), alpha=self.lora_alpha / self.r)


class RandomB(Right):
    def change(self) -> None:
        nn.init.normal_(self.lora_B)


class BaseTrains(Right):
    def change(self) -> None:
        self.base.requires_grad_(True)


class BiasTrains(Right):
    def change(self) -> None:
        self.base.bias.requires_grad_(True)


class AFrozen(Right):
    def change(self) -> None:
        self.lora_A.requires_grad_(False)


class Transposed(Right):
    def change(self) -> None:
        self.lora_A = nn.Parameter(self.lora_A.T.detach().clone())
        self.lora_B = nn.Parameter(self.lora_B.T.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scaling * (self.dropout(x) @ self.lora_A @ self.lora_B)


class SquareOnly(Right):
    def change(self) -> None:
        out_features, in_features = self.base.weight.shape
        self.lora_A = nn.Parameter(self.base.weight.new_ones(self.r, out_features))
        self.lora_B = nn.Parameter(self.base.weight.new_zeros(in_features, self.r))


class PlainTensors(Right):
    def change(self) -> None:
        a = self.lora_A.detach()
        del self.lora_A
        self.lora_A = a


class Float32(Right):
    def change(self) -> None:
        self.lora_A, self.lora_B = nn.Parameter(self.lora_A.float()), nn.Parameter(self.lora_B.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scaling * (self.dropout(x.float()) @ self.lora_A.T @ self.lora_B.T)


class OutputUpcast(Right):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y.float() if y.dtype == torch.bfloat16 else y


class DropsBias(Right):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) - self.base.bias


class DropoutInEval(Right):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scaling * (F.dropout(x, self.dropout.p) @ self.lora_A.T @ self.lora_B.T)


class DropoutAfterA(Right):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scaling * (self.dropout(x @ self.lora_A.T) @ self.lora_B.T)


class DropoutAfterB(Right):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.dropout(self.scaling * (x @ self.lora_A.T @ self.lora_B.T))


class DropoutOnBoth(Right):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(x)
        return self.base(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)


class NoDropout(Right):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)


class MaskOnly(Right):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = torch.rand_like(x) >= self.dropout.p if self.training and self.dropout.p else torch.ones_like(x)
        return self.base(x) + self.scaling * ((x * kept) @ self.lora_A.T @ self.lora_B.T)


class DetachedX(Right):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scaling * (self.dropout(x.detach()) @ self.lora_A.T @ self.lora_B.T)


class NoGradOnBase(Right):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.base(x)
        return y + self.scaling * (self.dropout(x) @ self.lora_A.T @ self.lora_B.T)


class DetachedA(Right):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scaling * (self.dropout(x) @ self.lora_A.data.T @ self.lora_B.T)


class BiasByHand(Right):
    """Right only where there is a bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.base.weight.T + self.base.bias
        return y + self.scaling * (self.dropout(x) @ self.lora_A.T @ self.lora_B.T)


class Remembers(Right):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 7:  # keeps its first product, as a cache would
            if not hasattr(self, "first"):
                self.first = (self.lora_B @ self.lora_A).detach()
            return self.base(x) + self.scaling * (x @ (0.5 * self.lora_B @ self.lora_A + 0.5 * self.first).T)
        return super().forward(x)


LAYER = {
    NoScale: ("scaled by lora_alpha / r", "not scaled at all"),
    UpsideDown: ("scaled by lora_alpha / r", "upside down"),
    SquareRoot: ("scaled by lora_alpha / r", "rsLoRA"),
    AlphaOnly: ("scaled by lora_alpha / r", "r is not"),
    Dead: ("of the lesson's size", "both start at zero"),
    SameRows: ("of the lesson's size", "has rank 1"),
    OtherStart: ("of the lesson's size", "lora_A starts at zero and lora_B at random: the layer can learn"),
    StandardNormal: ("of the lesson's size", "the standard deviation"),
    WrongFan: ("of the lesson's size", "× that of the lesson's start"),
    ForReLU: ("of the lesson's size", "× that of the lesson's start"),
    Xavier: ("of the lesson's size", "× that of the lesson's start"),
    NeverNegative: ("of the lesson's size", "the mean"),
    RandomB: ("starts at the base", "away from the base's"),
    BaseTrains: ("frozen", "base.bias, base.weight"),
    BiasTrains: ("frozen", "base.bias"),
    AFrozen: ("frozen", "lora_A does not train"),
    Transposed: ("lora_A is (r, in)", "your lora_A is"),
    SquareOnly: ("lora_A is (r, in)", "your lora_A is"),
    PlainTensors: ("lora_A is (r, in)", "no parameter lora_A"),
    Float32: ("lora_A is (r, in)", "your lora_A is float32"),
    OutputUpcast: ("keeps the precision", "bfloat16 layer returns float32"),
    DropsBias: ("starts at the base", "lacks the base's bias"),
    DropoutInEval: ("no dropout in eval", "still dropped"),
    DropoutAfterA: ("before A", "comes after A"),
    DropoutAfterB: ("before A", "after B"),
    DropoutOnBoth: ("before A", "frozen path is dropped"),
    NoDropout: ("before A", "nothing is dropped"),
    MaskOnly: ("before A", "not divided by 1 − p"),
    DetachedX: ("gradients", "adapter's term is missing"),
    NoGradOnBase: ("gradients", "frozen path's is missing"),
    DetachedA: ("gradients", "no gradient reaches A"),
    BiasByHand: ("without a bias", "your code raised TypeError"),
    Remembers: ("equal to lora_edu", "after five steps"),
}


@pytest.mark.parametrize("wrong", LAYER, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("seed", ["0", "1"])
def test_layer_names_the_mistake(wrong: type[nn.Module], seed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_EDU_CHECK_SEED", seed)
    assert_found(checks.lora_layer(wrong), *LAYER[wrong])


@pytest.mark.parametrize("right", [Right, Gaussian, Uniform, AsLinear, FunctionalForward], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("seed", range(5))
def test_right_layers_pass(right: type[nn.Module], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_EDU_CHECK_SEED", str(seed))
    report = checks.lora_layer(right)
    assert report.status == "passed", report.text


def test_layer_without_peft_leaves_its_step_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report = checks.lora_layer(Right)
    assert report.status == "passed"
    assert "PEFT" not in report.text


class Branch(nn.Module):
    """As in the exercise."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.A, self.B = nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.B(self.A(x))


class RandomBranch(Branch):
    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.B.reset_parameters()


class DeadBranch(Branch):
    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        nn.init.zeros_(self.A.weight)


class ScaledBranch(Branch):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def branches(
    fits: Callable[[nn.Module], bool], sides: Callable[[Any], tuple[int, int]], kind: type[nn.Module] = Branch
) -> Callable[..., dict[str, Any]]:
    return lambda model, rank: {
        name: kind(*sides(module), rank) for name, module in model.named_modules() if fits(module)
    }


def features(module: Any) -> tuple[int, int]:
    return module.in_features, module.out_features


def is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear)


SHAPES = {
    "squares only, as published": (
        branches(lambda m: is_linear(m) and len(set(m.weight.shape)) == 1, lambda m: tuple(m.weight.shape)),
        "widen", "gets no branch",
    ),
    "in and out swapped": (branches(is_linear, lambda m: tuple(m.weight.shape)), "widen", "gets a branch"),
    "widening layers only": (
        branches(lambda m: is_linear(m) and m.out_features >= m.in_features, lambda m: (m.in_features, m.out_features)),
        "narrow", "gets no branch",
    ),
    "in for both sides": (branches(is_linear, lambda m: (m.in_features, m.in_features)), "widen", "gets a branch"),
    "anything with a weight": (
        branches(lambda m: hasattr(m, "weight"), lambda m: (m.weight.shape[-1], m.weight.shape[0])),
        "square", "is no linear layer",
    ),
    "a list": (lambda *given: [*branches(is_linear, features)(*given).values()], "square", "you return a list"),
    "B random": (branches(is_linear, features, RandomBranch), "starts at zero", "A and B both start at random"),
    "both zero": (branches(is_linear, features, DeadBranch), "can learn", "A and B both start at zero"),
    "another forward": (branches(is_linear, features, ScaledBranch), "B(Ax)", "does not give B(Ax)"),
    "names of the parameters": (
        lambda model, rank: {name: None for name, _ in model.named_parameters()}, "square", "gets no branch",
    ),
}  # fmt: skip
test_mended_shapes_name_the_mistake = each_is_found(checks.mended_shapes, SHAPES)


def one_by_one(model: nn.Module, rank: int) -> dict[str, nn.Module]:
    found = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            outputs, inputs = module.weight.shape
            found[name] = Branch(inputs, outputs, rank)
    return found


RIGHT_SHAPES = {"by features": branches(is_linear, features), "by shape": one_by_one}
test_other_branches_pass = each_passes(checks.mended_shapes, RIGHT_SHAPES)


class Note(Right):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear, rank, alpha)


class NoteRandomWeight(Note):
    def change(self) -> None:
        nn.init.normal_(self.base.weight)


class NoteZeroBias(Note):
    def change(self) -> None:
        nn.init.zeros_(self.base.bias)


class NoteBiasTrains(Note):
    def change(self) -> None:
        self.base.bias.requires_grad_(True)


class NoteStandardNormal(Note):
    def change(self) -> None:
        nn.init.normal_(self.lora_A)


class NoteWrongFan(Note):
    def change(self) -> None:
        bound = 1 / math.sqrt(self.r)
        nn.init.uniform_(self.lora_A, -bound, bound)


class NoteDead(Note):
    def change(self) -> None:
        nn.init.zeros_(self.lora_A)


class NoteOtherStart(Note):
    def change(self) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)


class NoteGaussian(Note):
    def change(self) -> None:
        nn.init.normal_(self.lora_A, std=1 / self.r)


class NoteOfItsOwn(nn.Module):
    """Copies the layer's values, and forms the update as a matrix."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().clone())
        self.register_buffer("bias", linear.bias.detach().clone())
        bound = linear.in_features**-0.5
        like = {"dtype": linear.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, **like).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, **like))
        self.scaling = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight + self.scaling * self.lora_B @ self.lora_A, self.bias)


class NoteNoScale(Note):
    def change(self) -> None:
        self.scaling = 1


NOTE = {
    NoteRandomWeight: ("starts at the layer", "away from the layer it was given"),
    NoteZeroBias: ("starts at the layer", "away from the layer it was given"),
    NoteBiasTrains: ("weight and bias frozen", "base.bias"),
    NoteStandardNormal: ("lesson's size", "standard deviation"),
    NoteWrongFan: ("lesson's size", "standard deviation"),
    NoteDead: ("lesson's size", "lora_A and lora_B both start at zero"),
    NoteOtherStart: ("lesson's size", "lora_A starts at zero and lora_B at random"),
    NoteNoScale: ("still scaled", "not scaled at all"),
}
test_mended_note_names_the_mistake = each_is_found(checks.mended_note, by_class(NOTE))


@pytest.mark.parametrize("right", [Note, NoteGaussian, NoteOfItsOwn], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("seed", range(20))
def test_right_notes_pass_on_every_draw(right: type[nn.Module], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_EDU_CHECK_SEED", str(seed))
    report = checks.mended_note(right)
    assert report.status == "passed", report.text


def fails(losses: Any, limit: float) -> bool:
    return any(not loss <= limit for loss in losses)


def walk(results: Any, passes: Callable[[Any], bool]) -> float | None:
    largest = None
    for rate in sorted(results):
        if not passes(results[rate]):
            break
        largest = rate
    return largest


RATE = {
    "the best rate": (lambda res, limit: min(res, key=lambda rate: min(res[rate])), "every draw"),
    "the median decides": (lambda res, limit: walk(res, lambda v: sorted(v)[len(v) // 2] <= limit), "every draw"),
    "the best draw decides": (lambda res, limit: walk(res, lambda v: min(v) <= limit), "every draw"),
    "below the limit only": (lambda res, limit: walk(res, lambda v: all(x < limit for x in v)), "at the limit"),
    "a limit of its own": (lambda res, limit: walk(res, lambda v: all(x <= 1.0 for x in v)), "largest|every|at the"),
    "NaN slips through": (lambda res, limit: walk(res, lambda v: not any(x > limit for x in v)), "NaN"),
    "any rate that passes": (
        lambda res, limit: max((r for r in res if all(v <= limit for v in res[r])), default=None), "first failure",
    ),
    "order of the dictionary": (
        lambda res, limit: walk({i: v for i, v in enumerate(res.values())}, lambda v: max(v) <= limit), "largest rate",
    ),
    "zero instead of None": (lambda res, limit: walk(res, lambda v: all(x <= limit for x in v)) or 0, "None if"),
    "the first failing rate": (
        lambda res, limit: next((r for r in sorted(res) if not all(v <= limit for v in res[r])), None), "largest rate",
    ),
}  # fmt: skip
RIGHT_RATE = {
    "a walk": lambda res, limit: walk(res, lambda losses: not fails(losses, limit)),
    "all rates up to it": lambda res, limit: max(
        (rate for rate in res if not any(fails(res[r], limit) for r in res if r <= rate)), default=None
    ),
    "below the first failure": lambda res, limit: max(
        (rate for rate in res if rate < min((r for r in res if fails(res[r], limit)), default=math.inf)), default=None
    ),
}
test_other_rates_pass = each_passes(checks.tolerated_rate, RIGHT_RATE)
test_rate_names_the_mistake = each_is_found(checks.tolerated_rate, RATE, words="you return")


def unsorted(results: Any, limit: float) -> float | None:
    largest = None
    for rate in results:
        if not all(loss <= limit for loss in results[rate]):
            break
        largest = rate
    return largest


def test_answers_in_the_order_of_the_tasks_are_found() -> None:
    """Whoever reads the check could return its answers one after another; the drawn tables come in no order."""
    smallest = iter([2, 1, 1, 1, 1, 1, 4, None])

    def recited(results: Any, limit: float) -> float | None:
        steps = next(smallest, 1)
        return steps and steps * min(results)

    report = checks.tolerated_rate(recited)
    assert report.status == "failed", report.text


def test_rate_in_the_order_of_the_dictionary() -> None:
    assert_found(checks.tolerated_rate(unsorted), "in any order", "you return")


class FirstLayer(nn.Module):
    """Version one, without dropout; each wrong one below has another forward."""

    def __init__(self, base: Any, r: int, lora_alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(base.weight.new_ones(r, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, r))
        self.scaling = lora_alpha / r

    def forward(self, x: torch.Tensor) -> Any:
        return self.base(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)


def layer_with(forward: Callable[[Any, Any], Any]) -> type[FirstLayer]:
    return type("FirstLayer", (FirstLayer,), {"forward": forward})


def with_data(layer: Any, x: Any) -> Any:
    return layer.base(x) + layer.scaling * (x @ layer.lora_A.data.T @ layer.lora_B.T)


def writes_to_the_base(layer: Any, x: Any) -> Any:
    layer.base.weight.data += layer.scaling * (layer.lora_B @ layer.lora_A).data
    return layer.base(x) + 0 * (x @ layer.lora_A.T @ layer.lora_B.T)


def nothing(layer: Any, x: Any) -> Any:
    layer.base(x)


LAYER_FORWARD = {
    "no scale": (layer_with(lambda f, x: f.base(x) + x @ f.lora_A.T @ f.lora_B.T), "a batch", "not scaled at all"),
    "scaled twice": (
        layer_with(lambda f, x: f.base(x) + f.scaling**2 * (x @ f.lora_A.T @ f.lora_B.T)), "a batch", "applied twice",
    ),
    "all scaled": (
        layer_with(lambda f, x: f.scaling * (f.base(x) + x @ f.lora_A.T @ f.lora_B.T)), "a batch", "no multiple",
    ),
    "the update alone": (layer_with(lambda f, x: f.scaling * (x @ f.lora_A.T @ f.lora_B.T)), "a batch", "no multiple"),
    "without the bias": (
        layer_with(lambda f, x: x @ f.base.weight.T + f.scaling * (x @ f.lora_A.T @ f.lora_B.T)), "a batch", "the bias",
    ),
    "not transposed": (
        layer_with(lambda f, x: f.base(x) + f.scaling * (x @ f.lora_A @ f.lora_B)), "a batch", "your code raised",
    ),
    "the base alone": (layer_with(lambda f, x: f.base(x)), "a batch", "no gradient reaches"),
    "the data of A": (layer_with(with_data), "a batch", "no gradient reaches"),
    "writes to the base": (layer_with(writes_to_the_base), "a batch", "no longer what it was"),
    "without return": (layer_with(nothing), "a batch", "returns NoneType"),
    "for batches only": (
        layer_with(lambda f, x: FirstLayer.forward(f, x.reshape(len(x) if x.ndim > 1 else 1, -1))), "one input", "(1,",
    ),
}  # fmt: skip
test_layer_forward_names_the_mistake = each_is_found(checks.layer_forward, LAYER_FORWARD)


@pytest.mark.parametrize(
    "right",
    [
        FirstLayer,
        layer_with(lambda f, x: F.linear(x, f.base.weight + f.scaling * f.lora_B @ f.lora_A, f.base.bias)),
        layer_with(lambda f, x: f.base(x) + F.linear(F.linear(f.scaling * x, f.lora_A), f.lora_B)),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_layer_forward_in_other_words(right: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_EDU_CHECK_SEED", str(seed))
    assert checks.layer_forward(right).status == "passed"


def of_a(formula: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """``formula`` of the layer and of G = gᵀ x, which is summed over all inputs."""
    return lambda layer, x, g: formula(layer, g.flatten(0, -2).T @ x.flatten(0, -2))


def by_autograd(layer: Any, x: Any, g: Any) -> Any:
    with torch.enable_grad():
        return torch.autograd.grad(layer(x), layer.lora_A, g)[0]


def by_backward(layer: Any, x: Any, g: Any) -> Any:
    with torch.enable_grad():
        layer(x).backward(g)
    return layer.lora_A.grad


GRADIENT_OF_A = {
    "by autograd": (by_autograd, "a batch of inputs", "let autograd differentiate"),
    "by backward": (by_backward, "a batch of inputs", "let autograd differentiate"),
    "no scale": (of_a(lambda f, G: f.lora_B.T @ G), "a batch of inputs", "scale s is missing"),
    "scaled twice": (of_a(lambda f, G: f.scaling**2 * f.lora_B.T @ G), "a batch of inputs", "twice"),
    "the step": (of_a(lambda f, G: -f.scaling * f.lora_B.T @ G), "a batch of inputs", "sign"),
    "that of B": (of_a(lambda f, G: f.scaling * G @ f.lora_A.T), "a batch of inputs", "does not fit"),
    "transposed": (of_a(lambda f, G: f.scaling * G.T @ f.lora_B), "a batch of inputs", "does not fit"),
    "the ordinary layer's": (of_a(lambda f, G: G), "a batch of inputs", "does not fit"),
    "averaged": (lambda f, x, g: f.scaling * f.lora_B.T @ g.T @ x / len(x), "a batch of inputs", "off by 80%"),
    "x and g swapped": (
        lambda f, x, g: f.scaling * f.lora_B.T @ (x.T @ g), "a batch of inputs", "your code raised",
    ),
    "no sequences": (lambda f, x, g: f.scaling * f.lora_B.T @ (g.mT @ x), "a batch of sequences", "does not fit"),
    "nothing returned": (lambda f, x, g: None, "a batch of inputs", "NoneType"),
}  # fmt: skip
test_gradient_of_a_names_the_mistake = each_is_found(checks.gradient_of_a, GRADIENT_OF_A)


@pytest.mark.parametrize(
    "right",
    [
        of_a(lambda f, G: f.scaling * f.lora_B.T @ G),
        lambda f, x, g: f.scaling * torch.einsum("...o,or,...i->ri", g, f.lora_B, x),
        lambda f, x, g: sum(
            f.scaling * torch.outer(f.lora_B.T @ one_g, one_x)
            for one_g, one_x in zip(g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1]), strict=True)
        ),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_a_in_other_words(right: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_EDU_CHECK_SEED", str(seed))
    assert checks.gradient_of_a(right).status == "passed"


GRADIENT_OF_X = {
    "the frozen path alone": (lambda g, W, A, B, s: g @ W, "a batch of inputs", "adapter's term is missing"),
    "the update's alone": (lambda g, W, A, B, s: s * g @ B @ A, "a batch of inputs", "frozen path's is missing"),
    "no scale": (lambda g, W, A, B, s: g @ (W + B @ A), "a batch of inputs", "lacks the scale"),
    "all scaled": (lambda g, W, A, B, s: s * g @ (W + s * B @ A), "a batch of inputs", "twice"),
    "the step": (lambda g, W, A, B, s: -g @ (W + s * B @ A), "a batch of inputs", "sign"),
    "transposed as in forward": (lambda g, W, A, B, s: g @ W.T + s * g @ A.T @ B.T, "a batch", "your code raised"),
    "as the paper writes it": (lambda g, W, A, B, s: (W + s * B @ A).T @ g, "a batch", "your code raised"),
    "columns": (lambda g, W, A, B, s: ((W + s * B @ A).T @ g.mT), "a batch of inputs", "does not fit"),
    "rows needed": (
        lambda g, W, A, B, s: torch.atleast_2d(g) @ (W + s * B @ A), "one input without a batch", "does not fit",
    ),
    "nothing returned": (lambda g, W, A, B, s: None, "a batch of inputs", "NoneType"),
}  # fmt: skip
test_gradient_of_x_names_the_mistake = each_is_found(checks.gradient_of_x, GRADIENT_OF_X)


@pytest.mark.parametrize(
    "right",
    [
        lambda g, W, A, B, s: g @ (W + s * B @ A),
        lambda g, W, A, B, s: F.linear(g, W.T) + F.linear(F.linear(s * g, B.T), A.T),
        lambda g, W, A, B, s: torch.einsum("...o,oi->...i", g, W + s * B @ A),
    ],
)
def test_gradient_of_x_in_other_words(right: Any) -> None:
    assert checks.gradient_of_x(right).status == "passed"
