"""The checks of lesson 16: LoRA+ as plain LoRA (B1); in the lesson itself the start of PiSSA."""

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.core.config import LoraConfig
from lora_edu.core.inject import inject
from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.course.checks.tools import (
    close,
    is_several,
    is_tensor,
    known_slip,
    low_rank,
    need_number,
    need_untouched,
    normal,
    shape_or_type,
    small_llama,
    with_note,
)
from lora_edu.lowrank import truncated_svd
from lora_edu.variants.loraplus import create_loraplus_optimizer

STEPS = 6


def pissa_start(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """*Your turn* in lesson 16: ``candidate(W, r, s)`` is PiSSA's start (A₀, B₀)."""
    whole = "root = (S / s).sqrt(); return root[:, None] * Vh, U * root"

    def drawn() -> tuple[Tensor, int, float]:
        rows, columns = random.sample(range(9, 15), 2)
        return normal(rows, columns), random.randint(2, 4), random.choice([0.25, 0.5, 3.0, 4.0])

    def ask(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
        got = candidate(W.clone(), r, s)
        rows, columns = W.shape
        if not is_several(got, 2) or not is_tensor(got[0], (r, columns)) or not is_tensor(got[1], (rows, r)):
            found = " and ".join(map(shape_or_type, got)) if is_several(got, 2) else shape_or_type(got)
            raise Wrong(
                f"for a weight {tuple(W.shape)} and r={r} you return {found}",
                "Which factor reads the input, and which writes the output? In which order are they returned?",
                "A₀ is (r, in) and comes from Vh, B₀ is (out, r) and comes from U; return A₀, B₀.",
            )
        return got[0], got[1]

    def product() -> None:
        W, r, s = drawn()
        A, B = ask(W, r, s)
        U, S, Vh = truncated_svd(W, r)
        right = (U * S) @ Vh
        got = s * B @ A
        if close(got, right):
            return
        slips = [
            (s * right, "B₀A₀ itself is the principal part: s multiplies it once more"),
            (s**2 * right, "it is multiplied by s twice"),
            ((U * S**2) @ Vh * s, "each factor holds all of S: each needs its square root"),
            ((U * S**2) @ Vh, "each factor holds all of S: each needs its square root"),
            ((U * S**2) @ Vh / s, "each factor holds all of S / s: each needs its square root"),
            (s * U @ Vh, "the singular values are missing"),
            (U @ Vh, "the singular values are missing"),
            (W - right, "that is the residual: PiSSA trains the principal part"),
            (right / s, "it is divided by s twice: by √s in each factor is enough"),
        ]
        raise Wrong(
            with_note("s · B₀ A₀ is not the nearest matrix of rank r", known_slip(got, slips, close)),
            "s · B₀ A₀ shall be U_r S_r V_rᵀ. Where does s go, if it goes half into each factor?",
            whole,
        )

    def shared() -> None:
        W, r, s = drawn()
        A, B = ask(W, r, s)
        if not close(A.norm(dim=1), B.norm(dim=0), rtol=1e-6):
            raise Wrong(
                "the product is right, but the singular values are not shared evenly: the rows of A₀ and the columns "
                "of B₀ differ in length",
                "Which function of S / s gives the same factor twice?",
                whole,
            )

    def untouched() -> None:
        W, r, s = drawn()
        symptom = "your function writes into W, and the base must stay as it is"
        need_untouched(lambda: candidate(W, r, s), [W], symptom, whole)

    def deficient() -> None:
        W = low_rank(12, 9, 2)
        A, B = ask(W, 2, 2.0)
        if not close(2.0 * B @ A, W, rtol=1e-6, atol=1e-6):
            raise Wrong(
                "a matrix of rank 2 is not found again with r=2", "What is left of W after U_r S_r V_rᵀ?", whole
            )

    steps = [
        ("s · B₀ A₀ is the nearest matrix of rank r", product),
        ("the singular values are shared evenly", shared),
        ("a matrix of rank r is found again", deficient),
        ("W stays as it was", untouched),
    ]
    return run_steps("PiSSA's start", steps, hint)


def plain_twin(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """LoRA+'s training as plain LoRA's. Exercise B1 of lesson 16.

    ``candidate(config, lr, ratio)`` gives a ``LoraConfig`` and one rate. Both ways train, and the losses are compared.
    """
    question = "Write B = ratio · B′. Which number of the layer takes the ratio, and at which rate does B′ move?"
    fix = "Multiply lora_alpha, and every value of alpha_pattern, by ratio; the rate is lr, A's own."

    def ask(config: LoraConfig, lr: float, ratio: float) -> tuple[LoraConfig, float]:
        got = candidate(copy.deepcopy(config), lr, ratio)
        if not is_several(got, 2) or not isinstance(got[0], LoraConfig):
            raise Wrong(
                f"you return {shape_or_type(got)}, not a LoraConfig and a rate",
                "What does plain LoRA need to be told?",
                "Return the pair (LoraConfig, rate).",
            )
        return got[0], need_number(got[1], question, fix)

    def trained(config: LoraConfig, seed: int, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> Tensor:
        torch.manual_seed(seed)
        model = small_llama().double()
        inject(model, copy.deepcopy(config))
        ids = torch.randint(3, model.config.vocab_size, (4, 9))
        stepper, losses = optimizer(model), []
        for _ in range(STEPS):
            loss = model(input_ids=ids, labels=ids).loss
            losses.append(loss.item())
            stepper.zero_grad()
            loss.backward()
            stepper.step()
        return torch.tensor(losses, dtype=torch.float64)

    def plus(config: LoraConfig, lr: float, ratio: float, seed: int) -> Tensor:
        return trained(
            config,
            seed,
            lambda model: create_loraplus_optimizer(
                model, torch.optim.Adam, lr=lr, loraplus_lr_ratio=ratio, eps=1e-30, weight_decay=0.0
            ),
        )

    def plain(config: LoraConfig, lr: float, seed: int) -> Tensor:
        return trained(
            config,
            seed,
            lambda model: torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr, eps=1e-30),
        )

    def drawn() -> tuple[float, float, int]:
        return 10 ** random.uniform(-2.6, -2.3), random.choice([3.0, 8.0, 12.0]), random.randint(0, 999)

    def compare(config: LoraConfig, what: str) -> None:
        lr, ratio, seed = drawn()
        twin, rate = ask(config, lr, ratio)
        if twin.r != config.r or twin.rank_pattern != config.rank_pattern:
            raise Wrong(f"{what}: your config has other ranks", "Does LoRA+ change how many numbers train?", fix)
        right, got = plus(config, lr, ratio, seed), plain(twin, rate, seed)
        if close(got, right, rtol=1e-6):
            return
        slips = [
            (plain(config, lr, seed), "they are those of LoRA at A's rate, with the config as it was"),
            (plain(config, lr * ratio, seed), "they are those of LoRA at B's rate, with the config as it was"),
        ]
        note = known_slip(got, slips, lambda one, other: close(one, other, rtol=1e-6))
        apart = (got - right).abs().max().item()
        raise Wrong(
            with_note(f"{what}: after {STEPS} steps the losses differ by up to {apart:.2g}", note), question, fix
        )

    def usual() -> None:
        compare(LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"), "r=4, lora_alpha=6")

    def stabilised() -> None:
        config = LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj", "up_proj"], use_rslora=True)
        compare(config, "use_rslora=True, two targets")

    def patterns() -> None:
        config = LoraConfig(
            r=3,
            lora_alpha=4,
            target_modules="all-linear",
            rank_pattern={"v_proj": 5},
            alpha_pattern={"v_proj": 9, "down_proj": 1},
        )
        compare(config, "alpha_pattern for two of the targets")

    def untouched() -> None:
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], alpha_pattern={"q_proj": 5})
        before = copy.deepcopy(config)
        candidate(config, 1e-3, 16.0)
        if config != before:
            raise Wrong(
                "your function writes into the config that it was given",
                "Which objects does the caller still hold?",
                "dataclasses.replace(config, lora_alpha=…, alpha_pattern={…}) makes a new one.",
            )

    steps = [
        ("the same losses as LoRA+", usual),
        ("with rsLoRA's scale, too", stabilised),
        ("with an alpha of their own for some layers", patterns),
        ("the config stays as it was", untouched),
    ]
    return run_steps("LoRA+ without LoRA+", steps, hint)
