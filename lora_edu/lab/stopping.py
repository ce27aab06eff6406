"""Early stopping: the lowest held-out loss so far, the weights that had it, and whether to go on. Used in lesson 07."""

import torch
from torch import Tensor, nn


class Best:
    """Remembers the trainable weights of the lowest loss seen, if there is a ``patience`` to need them for."""

    def __init__(self, patience: int | None):
        self.patience, self.loss, self.since = patience, float("inf"), 0
        self.step: int | None = None
        self.weights: list[Tensor] = []

    def see(self, loss: float | None, step: int, trainable: list[nn.Parameter]) -> None:
        """Note the loss after ``step`` updates (None: nothing was evaluated), and the weights if it is the lowest."""
        if loss is None:
            return
        if loss < self.loss:
            self.loss, self.step, self.since = loss, step, 0
            if self.patience is not None:
                self.weights = [p.detach().clone() for p in trainable]
        else:
            self.since += 1

    @property
    def out_of_patience(self) -> bool:
        """Whether the last ``patience`` losses in a row brought no new lowest one."""
        return self.patience is not None and self.since >= self.patience

    @torch.no_grad()
    def restore(self, trainable: list[nn.Parameter]) -> None:
        """Put the remembered weights back."""
        for parameter, weight in zip(trainable, self.weights, strict=False):  # no weights were kept without patience
            parameter.copy_(weight)
