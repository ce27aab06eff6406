"""How a LoRA layer must start: B at zero, A random and of the right size. A start that trains worse is a mistake."""

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_edu.course.checks.report import Wrong

KAIMING = "nn.init.kaiming_uniform_(A, a=math.sqrt(5)) on a tensor of shape (r, in): uniform within ±1/√in"
Factors = tuple[Tensor, Tensor]


def need_start(build: Callable[[nn.Linear, int], Factors]) -> None:
    """Raise ``Wrong`` unless a fresh layer starts as PEFT's does, by default or with ``init_lora_weights="gaussian"``.

    The layers are so large that the spread of A's entries is known to a few per cent, whatever is drawn.

    Args:
        build: takes a linear layer and a rank, and gives A (r, in) and B (out, r) of a fresh layer around it.
    """
    rank, sizes = 16, []
    for inputs in (random.randint(380, 420), random.randint(1500, 1700)):
        A, B = (factor.detach().double() for factor in build(nn.Linear(inputs, 20), rank))
        need_one_zero(A, B)
        if (found := int(torch.linalg.matrix_rank(A))) < rank:
            raise Wrong(
                f"with r={rank} your lora_A has rank {found}: its rows are not independent",
                "What do rows that start alike get as their gradients?",
                f"{KAIMING}.",
            )
        sizes.append((inputs, A.std().item(), A.mean().item()))
    uniform = [size * math.sqrt(3 * inputs) for inputs, size, _ in sizes]
    gaussian = [size * rank for _, size, _ in sizes]
    centred = all(abs(mean) < 0.1 * size for _, size, mean in sizes)
    if centred and any(all(0.8 < ratio < 1.25 for ratio in each) for each in (uniform, gaussian)):
        return
    inputs, size, mean = sizes[1]
    symptom = f"the standard deviation {size:.3g}: {uniform[1]:.2g} × that of the lesson's start"
    if not centred:
        symptom = f"the mean {mean:.3g}, as large as their spread of {size:.3g}"
    raise Wrong(
        f"for {inputs} inputs and r={rank} the entries of your lora_A have {symptom}",
        "How large is A x if each entry of A has the standard deviation 1 and x has many entries? "
        "Which dimension of A does the initialisation read?",
        f"{KAIMING}; or normal with the standard deviation 1 / r.",
    )


def need_one_zero(A: Tensor, B: Tensor, a: str = "lora_A", b: str = "lora_B") -> None:
    """Raise ``Wrong`` if A starts at zero, and say truthfully what B does."""
    if A.any():
        if B.any():
            raise Wrong(
                f"{a} and {b} both start at random: the layer does not start at the pretrained one",
                "Which values must B have for BA to be zero?",
                f"Leave {b} at zero.",
            )
        return
    if not B.any():
        raise Wrong(
            f"{a} and {b} both start at zero: this layer can never learn",
            "∂L/∂A contains B, ∂L/∂B contains A. What are they when both are zero?",
            f"{KAIMING}; {b} stays at zero.",
        )
    raise Wrong(
        f"{a} starts at zero and {b} at random: the layer can learn, but it is the other start, not LoRA's",
        "Both starts give BA = 0. Which of the two factors is zero in the lesson's layer, and in PEFT's?",
        f"{KAIMING}; {b} at zero.",
    )
