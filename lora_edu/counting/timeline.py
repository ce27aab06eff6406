"""What a training step holds in memory, from its first operation to its last. Built in lesson 06.

PyTorch announces each operation before it runs; whoever listens sees every tensor appear, and a weak reference tells
when the memory behind it is freed. So the bytes can be counted on any device, and come out the same each time.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Timeline(TorchDispatchMode):
    """Follows the memory of what runs inside the block, operation by operation. Lesson 06.

    Args:
        model: its weights are there all the time and count as ``weights``.
        optimizer: what it keeps before the block begins counts as ``moments``; let it do a step first.

    Attributes:
        weights, moments: bytes, the same throughout.
        gradients: bytes of the trained parameters' gradients after each operation.
        others: bytes of all further live tensors after each operation: activations, and what is needed for a moment.
        phases: (name, number of operations before it) for each call of ``phase``.

    Only new memory is seen: a batch that was made before the block does not count.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        weights = _storages([*model.parameters(), *model.buffers()])
        states = _storages(kept)
        self.weights, self.moments = sum(weights.values()), sum(states.values())
        self.gradients: list[int] = []
        self.others: list[int] = []
        self.phases: list[tuple[str, int]] = []
        self._old = {*weights, *states}
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._live = 0

    def phase(self, name: str) -> None:
        """Say that a new part of the step begins."""
        self.phases.append((name, len(self.others)))

    def peaks(self) -> list[tuple[str, int]]:
        """(name, most bytes in all) for each phase."""
        ends = [start for _, start in self.phases[1:]] + [len(self.others)]
        return [
            (name, self.weights + self.moments + max(map(sum, zip(self.gradients[a:b], self.others[a:b], strict=True))))
            for (name, a), b in zip(self.phases, ends, strict=True)
        ]

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        gradients = sum(p.grad.untyped_storage().nbytes() for p in self._trained if p.grad is not None)
        self.gradients.append(gradients)
        self.others.append(self._live - gradients)
        return result

    def _note(self, storage: Any) -> None:
        """Count memory that was not there before, until it is freed."""
        place, size = storage.data_ptr(), storage.nbytes()
        if size and place not in self._old and place not in self._seen:
            self._live += size
            self._seen[place] = weakref.ref(storage, lambda _: self._gone(place, size))

    def _gone(self, place: int, size: int) -> None:
        self._live -= size
        del self._seen[place]


def _storages(tensors: list[Any]) -> dict[int, int]:
    """Address → bytes of the memory behind these tensors; each piece once, however many share it."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
