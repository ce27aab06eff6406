"""How many bytes the processes of a training step pass among each other, counted as they do it. Shown in lesson 25."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collectives(TorchDispatchMode):
    """Counts the bytes that collectives are called with: the whole of what is gathered, reduced or broadcast.

    ``with Collectives() as counted: ...`` leaves them in ``counted.bytes``, by the collective's name in PyTorch, such
    as "allreduce". What one process sends is less, since it need not send its own part: see lesson 25.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor)]
            # Of an all-gather's result and a reduce-scatter's input, one is the whole and the other one's own part.
            self.bytes[func._opname.strip("_")] += max(sizes, default=0) if "_base" in func._opname else sum(sizes)
        return func(*args, **(kwargs or {}))
