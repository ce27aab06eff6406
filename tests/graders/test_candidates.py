"""What every check does with its candidate: an answer that lies about itself does not pass, nor does the library's."""

from __future__ import annotations

import enum
import random
import sys
from collections import OrderedDict, UserString
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import ANY, MagicMock

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from found import calls
from lora_edu import LoRALinear, lowrank
from lora_edu.core import layer as core_layer
from lora_edu.core.matching import matches_names
from lora_edu.counting.measure import saved_bytes
from lora_edu.counting.memory import find_recipe
from lora_edu.course import checks
from lora_edu.course.checks.candidates import plain
from lora_edu.course.checks.report import Wrong
from lora_edu.lab.datasets import encode, format_chat

pytestmark = pytest.mark.graders


class Yes:
    """Equal to everything, unequal to nothing, true, and a number of any kind."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getitem__(self, index: Any) -> Any:
        return self

    def __le__(self, other: object) -> bool:
        return True

    __lt__ = __ge__ = __gt__ = __le__


def lying(base: type) -> type:
    """A class made from a type of Python's whose objects claim to equal everything."""
    methods = {name: vars(Yes)[name] for name in ("__eq__", "__ne__", "__le__", "__lt__", "__gt__", "__ge__")}
    return type(f"Lying{base.__name__}", (base,), methods | {"__hash__": object.__hash__})


class LyingTensor(Tensor):
    """Equal to every tensor, as far as PyTorch's functions ask it."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.allclose, torch.equal, Tensor.__eq__):
            return True
        return super().__torch_function__(function, types, args, kwargs or {})


class LyingModule(nn.Module):
    """A layer that is built with anything, and whose answers and attributes are all forged."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        self.__dict__["lora_A"] = self.__dict__["lora_B"] = Yes()

    def forward(self, x: Any) -> Any:
        return Yes()

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter([("lora_A", Yes()), ("lora_B", Yes())])


FORGED = {
    "an object that equals everything": Yes(),
    "mock.ANY": ANY,
    "a mock": MagicMock(),
    "an int": lying(int)(3),
    "a float": lying(float)(0.1),
    "a str": lying(str)("no"),
    "a list": lying(list)([1, 2]),
    "a tuple": lying(tuple)((1, 2)),
    "a dict": lying(dict)({"a": 1}),
    "a tensor": torch.zeros(3, 4).as_subclass(LyingTensor),
    "a pair of forged objects": (Yes(), Yes()),
    "three forged objects": [Yes(), Yes(), Yes()],
    "four forged numbers": tuple(lying(float)(0.1) for _ in range(4)),
    "forged entries": {"parameters": Yes(), "header_bytes": Yes(), "tensor_bytes": Yes()},
    "a module": LyingModule(),
}
CALLS = sorted({(call.values[1], len(call.values[2])) for call in calls()})


@pytest.mark.parametrize("forged", FORGED)
@pytest.mark.parametrize(("check", "number"), CALLS, ids=[check for check, _ in CALLS])
def test_no_check_accepts_an_answer_that_lies(check: str, number: int, forged: str) -> None:
    report = getattr(checks, check)(*[lambda *args, **kwargs: FORGED[forged]] * number)
    assert report.status == "failed", report.text


@pytest.mark.parametrize("candidate", [Yes, Yes(), LyingModule, MagicMock, ANY], ids=str)
@pytest.mark.parametrize(("check", "number"), CALLS, ids=[check for check, _ in CALLS])
def test_no_check_accepts_a_candidate_that_lies(check: str, number: int, candidate: Any) -> None:
    report = getattr(checks, check)(*[candidate] * number)
    assert report.status == "failed", report.text


class Derived(LoRALinear):
    """Nothing of one's own."""


class Inherited(peft.tuners.lora.LoraLayer):
    """Nothing of one's own."""


class Wrapped(nn.Module):
    """The library's layer in a box."""

    def __init__(self, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0):
        super().__init__()
        self.layer = LoRALinear(base, r, lora_alpha, lora_dropout)
        self.lora_A, self.lora_B = self.layer.lora_A, self.layer.lora_B

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Disguised(nn.Module):
    """Its objects are of another class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return LoRALinear(*args, **kwargs)


def rows(entry: dict, tokenizer: Any, max_length: int) -> dict:
    return encode([entry], tokenizer, max_length, chat=True)[0]


LIBRARY = {
    "the layer": ("lora_layer", LoRALinear, "the library's own layer, lora_edu.core.layer.LoRALinear"),
    "another name for it": ("mended_note", core_layer.LoRALinear, "the library's own layer"),
    "the layer, partly called": ("lora_layer", partial(LoRALinear, lora_dropout=0.0), "the library's own layer"),
    "a class derived from it": ("lora_layer", Derived, "your class derives from the library's own layer"),
    "a class derived from PEFT's": ("lora_layer", Inherited, "your class derives from the library's own code, peft."),
    "a function around it": ("lora_layer", lambda *a, **k: LoRALinear(*a, **k), "the library's own layer"),
    "the layer in a box": ("lora_layer", Wrapped, "inside yours works the library's own layer"),
    "the layer in disguise": ("lora_layer", Disguised, "the library's own layer"),
    "PEFT's layer": ("lora_layer", peft.tuners.lora.Linear, "the library's own layer, peft."),
    "a function": ("rank_r_approximation", lowrank.low_rank_approximation, "the library's own code"),
    "PyTorch's function": ("softmax_by_hand", torch.nn.functional.softmax, "the library's own code"),
    "another function": ("name_matching", lambda name, targets: matches_names(targets, name), "you call"),
    "bytes": ("state_bytes", lambda f, t, *given: find_recipe("full", "bf16").trained * t, "you call find_recipe"),
    "kept bytes": ("kept_bytes", lambda model, forward: saved_bytes(model, forward), "you call saved_bytes"),
    "a chat row": ("encode_chat", rows, "you call encode"),
    "a chat prompt": ("encode_chat", lambda entry, tokenizer, n: format_chat(entry, tokenizer), "you call format_chat"),
    "a scale": (
        "scale_of",
        lambda f: core_layer.scale_of(f.get("lora_alpha", 8), f.get("r", 8), f.get("use_rslora", False)),
        "the library's scale_of",
    ),
}


@pytest.mark.parametrize("case", LIBRARY)
def test_what_is_the_librarys_own_is_named(case: str) -> None:
    check, candidate, symptom = LIBRARY[case]
    report = getattr(checks, check)(candidate)
    assert report.status == "failed", report.text
    assert symptom in report.symptom, report.text
    assert sys.getprofile() is None


def svd(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A function of the learner's own, which only has a name that the check looks for."""
    A = torch.randn(r, W.shape[1], dtype=W.dtype)
    for _ in range(40):
        B = torch.linalg.lstsq(A.T, W.T).solution.T
        A = torch.linalg.lstsq(B, W).solution
    return B, A


def test_a_learners_own_function_may_have_any_name() -> None:
    report = checks.fitted_factors(lambda W, r: svd(W, r))
    assert report.status == "passed", report.text


class Number(enum.IntEnum):
    TWO = 2


class Pair(NamedTuple):
    one: float
    other: int


def test_answers_in_other_types_are_made_plain() -> None:
    tensor, parameter = torch.zeros(2), nn.Parameter(torch.zeros(2))
    made = {
        Number.TWO: 2,
        Pair(0.5, Number.TWO): (0.5, 2),
        np.float64(0.5): 0.5,
        np.int64(3): 3,
        np.bool_(True): True,
        range(3): range(3),
        frozenset([np.int64(1)]): frozenset([1]),
    }
    for value, right in made.items():
        assert plain(value) == right
        assert type(plain(value)) is type(right)
    assert plain(x for x in (1, np.int64(2))) == [1, 2]
    assert plain(OrderedDict(a=[Number.TWO])) == {"a": [2]}
    assert type(plain(OrderedDict())) is dict
    assert type(plain(torch.Size([2, 3]))) is tuple
    assert plain(map(int, "12")) == [1, 2]
    assert plain(tensor) is tensor
    assert plain([parameter])[0] is parameter
    assert plain(None) is None
    model = nn.Sequential(nn.Linear(2, 2))
    assert plain(model) is model


def test_what_could_claim_anything_is_refused() -> None:
    with_method: Any = torch.zeros(2)
    with_method.norm = lambda: 0.0
    for value in (Yes(), ANY, [Yes()], {"a": (Yes(),)}, UserString("a"), with_method, FORGED["a tensor"]):
        with pytest.raises(Wrong):
            plain(value)


def test_a_layer_may_not_replace_what_a_module_holds() -> None:
    class Overridden(nn.Module):
        def __init__(self, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0):
            super().__init__()
            self.base = base

        def parameters(self, recurse: bool = True) -> Any:
            return iter([])

    report = checks.lora_layer(Overridden)
    assert "replaces parameters, which nn.Module has" in report.symptom


@pytest.mark.parametrize("outer", [0, 1])
@pytest.mark.parametrize(("notebook", "check", "objects"), [call.values for call in calls()])
def test_the_checks_draw_nothing_outside(notebook, check, objects, outer, from_solution, monkeypatch) -> None:
    """What a check draws depends on its own seed alone, and the learner's random numbers go on as they were."""
    monkeypatch.setenv("LORA_EDU_CHECK_SEED", "4")
    answers = [from_solution(notebook, name) for name in objects]
    random.seed(outer), np.random.seed(outer), torch.manual_seed(outer)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert getattr(checks, check)(*answers)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
