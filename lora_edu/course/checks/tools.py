"""What the checks of several lessons need: draws, closeness, known slips, scales, refusals, small models.

A tool knows no exercise. What only one lesson asks for stands in that lesson's module.
"""

import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_edu.course.checks.report import Wrong


def normal(*shape: int) -> Tensor:
    """Standard normal numbers in float64, in which a right answer differs from the oracle by rounding only."""
    return torch.randn(*shape, dtype=torch.float64)


def between(low: int, high: int) -> int:
    """A random whole number, both ends included, from the generator that draws the tensors too."""
    return int(torch.randint(low, high + 1, ()))


def low_rank(rows: int, columns: int, r: int) -> Tensor:
    """A random matrix (rows, columns) of rank r, as a product of two factors."""
    return normal(rows, r) @ normal(r, columns)


def randomise(layer: Any) -> tuple[Tensor, Tensor]:
    """Write random values into ``layer.lora_A`` and ``layer.lora_B``, as if it had been trained, and return copies."""
    for parameter in (layer.lora_A, layer.lora_B):
        parameter.data.copy_(torch.randn_like(parameter))
    return layer.lora_A.detach().clone(), layer.lora_B.detach().clone()


def small_llama(**config: Any) -> Any:
    """A very small Llama with random weights, in eval mode; called twice under one seed it gives the same one.

    Args:
        config: fields of ``LlamaConfig`` that should differ from the small ones.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"vocab_size": 23, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**small | {"num_attention_heads": 2} | config)).eval()


def peft_linear(base: nn.Linear, **config: Any) -> tuple[Any, Any]:
    """PEFT's model around one linear layer, and the adapted layer in it; ``config`` are fields of ``LoraConfig``."""
    import peft

    with warnings.catch_warnings(action="ignore"):
        model: Any = peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(target_modules=["0"], **config))
    return model, model.base_model.model[0]


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder that is gone after the block."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def close(got: Tensor, right: Tensor, rtol: float = 1e-9, atol: float = 1e-9) -> bool:
    """Equal to rounding in every entry, and of one shape; ``right`` is taken in the precision of the answer."""
    return got.shape == right.shape and torch.allclose(got, right.to(got.dtype), rtol=rtol, atol=atol)


def off_by(got: Tensor, right: Tensor) -> float:
    """‖got − right‖ / ‖right‖: the share by which an answer is off, as in "off by 50%"."""
    return ((got - right).norm() / right.norm().clamp(min=1e-12)).item()


def close_in_norm(got: Tensor, right: Tensor, tolerance: float = 1e-6) -> bool:
    """Of one shape, and off by next to nothing; for answers whose entries have rounding errors of each other's size."""
    return got.shape == right.shape and off_by(got, right) <= tolerance


def close_number(got: float, right: float, tolerance: float = 1e-9) -> bool:
    """Equal to rounding; the tolerance is relative, and NaN equals nothing."""
    return math.isclose(got, right, rel_tol=tolerance, abs_tol=1e-12)


def factor_between(got: Tensor, right: Tensor) -> float:
    """The c for which c · right comes nearest to got: how many times too large an answer is."""
    return ((got * right).sum() / (right * right).sum()).item()


def is_whole(value: Any) -> bool:
    """An int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """An int or a float; True and False are none, nor is a tensor with one entry."""
    return isinstance(value, float) or is_whole(value)


def need_number(value: Any, question: str, fix: str) -> float:
    """The value if it is a number."""
    if not is_number(value):
        raise Wrong(f"you return {value!r}: expected a number", question, fix)
    return value


def need_whole(value: Any, question: str, fix: str) -> int:
    """The value if it is a whole number."""
    if not is_whole(value):
        raise Wrong(f"you return {value!r}: expected a whole number", question, fix)
    return value


def is_several(value: Any, number: int) -> bool:
    """A tuple or list with so many entries."""
    return isinstance(value, tuple | list) and len(value) == number


def need_several(value: Any, number: int, expected: str, question: str, fix: str) -> Sequence[Any]:
    """The value if it is a tuple or list with so many entries; ``expected`` says of what, e.g. "three numbers"."""
    if not is_several(value, number):
        raise Wrong(f"you return {value!r}: expected {expected}", question, fix)
    return value


def is_tensor(value: Any, shape: Sequence[int]) -> TypeGuard[Tensor]:
    """A tensor of that shape."""
    return isinstance(value, Tensor) and tuple(value.shape) == tuple(shape)


def shape_or_type(value: Any) -> str:
    """What a value is, in words: the shape of a tensor, else the name of its type."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def is_transposed(shape: Sequence[int], right: Sequence[int]) -> bool:
    """The right shape the other way round, and not a square."""
    return tuple(shape) == tuple(right)[::-1] != tuple(right)


def dtype_name(tensor: Tensor) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(tensor.dtype).removeprefix("torch.")


def need_refusal(
    call: Callable[[], Any],
    symptom: str | Callable[[Any], str],
    question: str,
    fix: str,
    error: type[Exception] = ValueError,
) -> None:
    """Raise ``Wrong`` unless the call raises ``error``; the symptom may be made from what is returned instead."""
    try:
        got = call()
    except error:
        return
    raise Wrong(symptom if isinstance(symptom, str) else symptom(got), question, fix)


def need_untouched(call: Callable[[], Any], given: Sequence[Tensor], symptom: str, fix: str) -> None:
    """Raise ``Wrong`` if the call changes one of the tensors that it is given."""
    before = [each.clone() for each in given]
    call()
    if not all(torch.equal(one, other) for one, other in zip(before, given, strict=True)):
        raise Wrong(symptom, "Which of your operations work in place?", fix)


def known_slip(
    got: Any,
    slips: Iterable[tuple[Any, str]],
    same: Callable[[Any, Any], bool] = close_number,
    otherwise: str = "",
) -> str:
    """What is said about the first of the wrong values that the answer equals; ``otherwise`` if it equals none.

    Args:
        got: the learner's answer, known to be wrong.
        slips: pairs of a value to which a usual mistake leads, and what is said about it.
        same: whether two values are the same.
        otherwise: what is said about an unknown mistake.
    """
    return next((words for value, words in slips if same(got, value)), otherwise)


def with_note(symptom: str, note: str) -> str:
    """The symptom, and behind a colon what is known about the mistake, if anything is."""
    return f"{symptom}: {note}" if note else symptom


def scale_slips(right: Tensor, s: float) -> list[tuple[Tensor, str]]:
    """What comes out of a product with the scale s if s is left out, or comes in twice."""
    return [(right / s, "the scale s is missing"), (right * s, "the scale s is in it twice")]


def need_scale(got: Tensor, update: Tensor, alpha: float, r: int) -> None:
    """Raise ``Wrong`` unless ``got`` is lora_alpha / r times ``update``, which is x Aᵀ Bᵀ."""
    factor, right = factor_between(got, update), alpha / r
    where = f"with r={r} and lora_alpha={alpha}"
    if not close(got, factor * update):
        raise Wrong(
            f"{where} what you add to x Wᵀ + b is no multiple of x Aᵀ Bᵀ",
            "Print the shapes from left to right. Is the frozen path there once, and is the order A, then B?",
            "y = x @ W.T + (lora_alpha / r) * (x @ A.T @ B.T), plus the bias if there is one.",
        )
    if close_number(factor, right):
        return
    slips = {
        1.0: "it is not scaled at all",
        alpha: "lora_alpha is there, r is not",
        1 / r: "r is there, lora_alpha is not",
        r / alpha: "the fraction stands upside down",
        alpha / math.sqrt(r): "you divide by √r: that is rsLoRA",
        alpha * r: "you multiply by r",
        right**2: "the scale is applied twice",
        0.0: "it is zero",
    }
    raise Wrong(
        f"{where} your update is {factor / right:.3g} × what it should be: "
        + known_slip(factor, slips.items(), otherwise="no known slip"),
        "Which number stands between lora_alpha and the update?",
        "The scale is s = lora_alpha / r.",
    )


def trainable(module: nn.Module) -> list[str]:
    """The names of the parameters that train."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of everything in the module's state dict, to compare with later."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """The names of what is no longer as :func:`values_of` found it."""
    now = module.state_dict()
    return [name for name, value in before.items() if name not in now or not torch.equal(now[name], value)]


class Operations(TorchDispatchMode):
    """Keeps what PyTorch computes inside the block, as ``seen``: (name such as "addmm", arguments, result) each.

    Tensors are held as long as this object lives, so that no address is used twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.seen.append((operation.overloadpacket.__name__, args, result))
        return result
