"""What modules and configs do in a training step beside computing the loss. Called by ``train``."""

import warnings
from typing import Any

from torch import Tensor, nn

from lora_edu.core.adapter import AdapterLayer
from lora_edu.core.state import adapter_state, injected_models
from lora_edu.lab.diagnose import without_gradient

HOOKS = ("extra_loss", "after_backward", "after_step")


class Hooks:
    """The training hooks of a model: those of its modules, and of its adapters' configs.

    ``extra_loss()`` adds to the loss; ``after_backward(step)`` runs once the gradients are there, before they are
    clipped; ``after_step(step)`` after the optimizer's step, before they are cleared. Steps count from 1. Layers and
    configs of adapters that are not active train nothing and are not called.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.first = True
        states = [adapter_state(each) for each in injected_models(model).values()]
        configs = [config for state in states for name, config in state.configs.items() if name in state.active]
        modules = [each for each in model.modules() if not (isinstance(each, AdapterLayer) and not each.active)]
        self.holders: dict[str, list[Any]] = {
            name: [each for each in (*modules, *configs) if hasattr(each, name)] for name in HOOKS
        }

    def add_to(self, loss: Tensor) -> Tensor:
        """The loss with every ``extra_loss()``."""
        for holder in self.holders["extra_loss"]:
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
        for holder in self.holders["after_backward"]:
            holder.after_backward(step)

    def after_step(self, step: int) -> None:
        """Call the hooks of that name."""
        for holder in self.holders["after_step"]:
            holder.after_step(step)
