"""A learner's functions and classes, taken with care before a check calls them.

Python lets an object claim to equal everything, and a name can stand for somebody else's work. So what a check is
given goes through here first: an answer becomes plain numbers, texts and tensors before anything is compared, and a
candidate that is the library's own is named. It stops what is cheap to try; who takes the trouble gets past it.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from types import FrameType, GeneratorType
from typing import Any

import numpy as np
from torch import Tensor, nn

from lora_edu.course.checks.report import LIBRARY, Report, Wrong

Check = Callable[..., Report]
LIBRARIES = ("lora_edu", "peft")
# Their objects may be part of an answer, and they report truthfully what they are.
PACKAGES = (*LIBRARIES, "torch", "transformers", "numpy", "pathlib", "fractions", "decimal", "re")
FROM_A_CLASS_STATEMENT = 1 << 9  # Py_TPFLAGS_HEAPTYPE: the types of Python itself do not have it
WHAT_A_MODULE_HOLDS = (
    "__call__", "__getattribute__", "parameters", "named_parameters", "modules", "named_modules", "get_parameter",
    "get_submodule", "state_dict",
)  # fmt: skip
AUTOGRAD = ("torch.autograd.grad", "torch.autograd.backward", "torch.autograd.functional", "torch._functorch")
VALUES = "Return plain values: numbers, text, tensors, or lists, tuples and dictionaries of these."


def examined(check: Check) -> Check:
    """The check, with every candidate taken as :func:`learners` takes it."""
    return on_candidates(check, learners)


def on_candidates(check: Check, change: Callable[[Any], Any]) -> Check:
    """The check, called with ``change(candidate)`` for each of its candidates; ``hint`` is none."""
    signature = inspect.signature(check)

    @wraps(check)
    def changed(*args: Any, **kwargs: Any) -> Report:
        given = signature.bind(*args, **kwargs)
        for name, value in given.arguments.items():
            if name != "hint":
                given.arguments[name] = change(value)
        return check(*given.args, **given.kwargs)

    return changed


def learners(candidate: Any) -> Callable[..., Any]:
    """The candidate as the checks call it: it must be the learner's own work, and what it gives is made plain.

    An object of the learner's own class is given as it is. If it is a layer, it may hold no layer of a library, and
    what its ``forward`` returns is made plain as well.
    """
    own = unwrapped(candidate)

    def call(*args: Any, **kwargs: Any) -> Any:
        need_own_work(own)
        answer = candidate(*args, **kwargs)
        if isinstance(answer, nn.Module):
            need_honest_module(answer)
            need_own_layer(answer)
            if not is_known(type(answer)):
                answer.register_forward_hook(lambda module, given, output: plain(output))
            return answer
        return answer if isinstance(own, type) and type(answer) is own else plain(answer)

    return call


def unwrapped(candidate: Any) -> Any:
    """The function or class inside a ``partial``."""
    return unwrapped(candidate.func) if isinstance(candidate, partial) else candidate


def need_own_work(candidate: Any) -> None:
    """Raise ``Wrong`` if the candidate is a function or class of a library, or a class derived from one of its own."""
    for origin in candidate.__mro__ if isinstance(candidate, type) else [candidate]:
        if not belongs_to(origin, PACKAGES if origin is candidate else LIBRARIES):
            continue
        kind = "layer" if isinstance(origin, type) and issubclass(origin, nn.Module) else "code"
        raise Wrong(
            f"{'this is' if origin is candidate else 'your class derives from'} the library's own {kind}, "
            f"{full_name(origin)}",
            "Which lines of it did you write?",
            "Write it yourself, and compare with the library's afterwards.",
        )


def need_own_layer(layer: nn.Module) -> None:
    """Raise ``Wrong`` if the layer, or one that a layer of the learner's own holds, is one of lora_edu or PEFT."""
    for module in [layer] if is_known(type(layer)) else layer.modules():
        if belongs_to(type(module), LIBRARIES):
            raise Wrong(
                f"{'this is' if module is layer else 'inside yours works'} the library's own layer, "
                f"{full_name(type(module))}",
                "Which lines of it did you write?",
                "Write the two factors and the forward pass yourself, and compare with the library's afterwards.",
            )


def belongs_to(work: Any, packages: Sequence[str]) -> bool:
    """Whether a function or class comes from one of the packages."""
    return str(getattr(work, "__module__", "")).partition(".")[0] in packages


def full_name(work: Any) -> str:
    """``lora_edu.core.layer.LoRALinear``."""
    return f"{work.__module__}.{getattr(work, '__qualname__', type(work).__qualname__)}"


def need_honest_module(module: nn.Module) -> None:
    """Raise ``Wrong`` if the module's own class replaces what tells the checks which parameters there are."""
    kind = type(module)
    if is_known(kind):
        return
    for name in WHAT_A_MODULE_HOLDS:
        if name in vars(module) or getattr(kind, name) is not getattr(nn.Module, name):
            raise Wrong(
                f"your {kind.__name__} replaces {name}, which nn.Module has",
                "Which methods does a layer of your own need?",
                "Write __init__ and forward, and leave what nn.Module says about itself as it is.",
            )


def is_known(kind: type) -> bool:
    """A type of Python itself or of a package that answers may come from, not one that the learner made."""
    home = sys.modules.get(kind.__module__)
    of_a_package = kind.__module__.partition(".")[0] in PACKAGES and getattr(home, kind.__name__, None) is kind
    return of_a_package or not kind.__flags__ & FROM_A_CLASS_STATEMENT


def plain(value: Any) -> Any:
    """The value in exact types of Python and PyTorch, containers and what is in them included.

    An ``IntEnum``, a ``NamedTuple``, a NumPy number or a generator is turned into the plain int, tuple, number or list
    with the same content. Modules, and objects of the packages that the course works with, stay what they are.

    Raises:
        Wrong: for an object of a class that could claim anything about itself.
    """
    kind = type(value)
    if isinstance(value, Tensor):
        return plain_tensor(value)
    if issubclass(kind, nn.Module):
        need_honest_module(value)
        return value
    if issubclass(kind, np.generic) and is_known(kind):
        return plain(value.item())
    for base, copy in COPIES.items():
        if issubclass(kind, base):
            return copy(value)
    if is_known(kind):
        return value
    raise Wrong(f"you return an object of the class {kind.__name__}", "What does the task say comes back?", VALUES)


# Called on the base class, so that no method of a derived one has a say.
COPIES: dict[type, Callable[[Any], Any]] = {
    bool: bool,
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    tuple: lambda value: tuple(map(plain, tuple.__iter__(value))),
    list: lambda value: list(map(plain, list.__iter__(value))),
    dict: lambda value: {plain(key): plain(each) for key, each in dict.items(value)},
    set: lambda value: set(map(plain, set.__iter__(value))),
    frozenset: lambda value: frozenset(map(plain, frozenset.__iter__(value))),
    GeneratorType: lambda value: list(map(plain, value)),
    map: lambda value: list(map(plain, map.__iter__(value))),
    filter: lambda value: list(map(plain, filter.__iter__(value))),
}


def plain_tensor(value: Tensor) -> Tensor:
    """The tensor, if it is exactly one of PyTorch's and has no method of its own."""
    if type(value) not in (Tensor, nn.Parameter):
        raise Wrong(
            f"you return a {type(value).__name__}, a class made from Tensor",
            "What does a calculation with plain tensors give?",
            VALUES,
        )
    if own := sorted(name for name in vars(value) if hasattr(Tensor, name)):
        raise Wrong(f"your tensor has a {own[0]} of its own", "Who wrote it, and what for?", VALUES)
    return value


def without(*names: str, symptom: str, question: str, fix: str) -> Callable[[Check], Check]:
    """Decorate a check whose exercise is to write something by hand: to call what does it ready-made is a mistake.

    Args:
        names: functions by their last name ("softmax"), which means those of every package; or packages, modules and
            functions of Python code in full ("peft", "lora_edu.lowrank", "lora_edu.lowrank.effective_rank").
        symptom: what is said, with ``{name}`` for the function that was called.
        question: as in ``Wrong``.
        fix: as in ``Wrong``.
    """

    def is_ready_made(called: str) -> bool:
        in_full = any(f"{called}.".startswith(f"{name}.") for name in names)
        return in_full or called.rpartition(".")[2] in names

    def watched(candidate: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen: list[str] = []
            try:
                with noting_calls(seen):
                    return candidate(*args, **kwargs)
            finally:  # also where the answer is wrong, or the call has failed
                if found := next(filter(is_ready_made, seen), None):
                    raise Wrong(symptom.format(name=found.rpartition(".")[2]), question, fix) from None

        return call

    return lambda check: on_candidates(check, watched)


@contextmanager
def noting_calls(seen: list[str]) -> Iterator[None]:
    """Append the functions that run inside the block to ``seen``: those of packages in full, those in C by name.

    What the learner defines is left out, and so is what the checks themselves call.
    """

    def note(frame: FrameType, event: str, function: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(__package__):
            return
        if event == "c_call":
            # what is torch.linalg.svd in Python is called linalg_svd in C
            name = function.__name__.removeprefix("linalg_").removeprefix("special_")
            seen.extend([name, type(getattr(function, "__self__", None)).__name__])
        elif event == "call" and is_installed(frame.f_code.co_filename):
            seen.append(f"{module}.{frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


def is_installed(file: str) -> bool:
    """Whether a file of Python code belongs to the course or to an installed package."""
    return "site-packages" in file or Path(file).is_relative_to(LIBRARY)
