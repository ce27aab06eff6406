"""What modules and configs do in a training step beside computing the loss. Called by ``train``."""

import warnings
from typing import Any

from torch import Tensor, nn

from lora_edu.core.state import adapter_state, injected_models
from lora_edu.lab.diagnose import without_gradient


class Hooks:
    """The training hooks of a model: those of its modules, and of the configs of its adapters.

    ``extra_loss()`` adds to the loss; ``after_backward(step)`` runs once the gradients are there, before they are
    clipped; ``after_step(step)`` after the optimizer's step, before they are cleared. Steps count from 1.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.first = True
        configs = [c for each in injected_models(model).values() for c in adapter_state(each).configs.values()]
        self.holders: list[Any] = [*model.modules(), *configs]

    def add_to(self, loss: Tensor) -> Tensor:
        """The loss with every ``extra_loss()``."""
        for holder in self.holders:
            if hasattr(holder, "extra_loss"):
                loss = loss + holder.extra_loss()
        return loss

    def after_backward(self, step: int) -> None:
        """Call the hooks of that name; the first time, also name adapted layers that got no gradient."""
        if self.first and (names := without_gradient(self.model)):
            warnings.warn(
                f"{len(names)} adapted layers got no gradient, so the model did not call them in this step: "
                f"{', '.join(names[:4])}{', …' if names[4:] else ''}",
                stacklevel=3,
            )
        self.first = False
        self._call("after_backward", step)

    def after_step(self, step: int) -> None:
        """Call the hooks of that name."""
        self._call("after_step", step)

    def _call(self, name: str, step: int) -> None:
        for holder in self.holders:
            if hasattr(holder, name):
                getattr(holder, name)(step)
