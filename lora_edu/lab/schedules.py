"""How the learning rate goes over a run: what ``train(schedule=…)`` multiplies it with. Used in lesson 07."""

from collections.abc import Callable

SCHEDULES = ("constant", "linear")


def rate_factor(schedule: str, steps: int, warmup_steps: int = 0) -> Callable[[int], float]:
    """The factor before the learning rate, as a function of the updates that were made before, 0, 1, 2, …

    It rises linearly over ``warmup_steps`` to 1, which the last of them has. Then it stays ("constant"), or falls
    linearly ("linear") so that it would reach 0 one step after the last of ``steps``, as in Hugging Face's Trainer.

    Raises:
        ValueError: for an unknown schedule, or one that has no steps left in which the rate could fall.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}: expected one of {', '.join(map(repr, SCHEDULES))}")
    if schedule == "linear" and warmup_steps >= steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} of {steps} steps leave none in which the rate could fall; "
            "warm up for fewer, or take schedule='constant'"
        )

    def factor(done: int) -> float:
        if done < warmup_steps:
            return (done + 1) / warmup_steps
        return 1.0 if schedule == "constant" else (steps - done) / (steps - warmup_steps)

    return factor
