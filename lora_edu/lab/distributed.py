"""Several processes that train one model together: who takes which rows, what each loss weighs, how the model returns.

``accelerate launch`` starts the processes, one for each GPU. Each runs the whole script; what follows lets ``train``
give in all of them what one process would give. With one process nothing here changes anything. Explained in lesson 25.
"""

import copy
import os
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_edu.lab.datasets import IGNORED
from lora_edu.quick import is_quick

Anything = TypeVar("Anything")
STREAM = 1_000_003  # between the seeds of two processes: far from the 0, 1, 2, … of several runs


def _on_the_cpu() -> bool:
    """Whether to stay on the CPU: in a quick run, when told to, or launched with others on a machine without a GPU.

    In the last case Accelerate has to be told: it would take each process for the only one, and all would do the same
    work side by side. With a GPU, whoever launches several processes means the GPUs.
    """
    if parse_flag_from_env("ACCELERATE_USE_CPU") or ("LOCAL_RANK" not in os.environ and is_quick()):
        return True
    found = torch.accelerator.current_accelerator(check_available=True)
    return "LOCAL_RANK" in os.environ and (found is None or found.type == "mps")


def process_state() -> PartialState:
    """This process among the others: its number, how many there are, which is the main one, and its device.

    The first call meets the others, so all of them must make it.
    """
    return PartialState(cpu=_on_the_cpu())


def new_accelerator() -> Accelerator:
    """Accelerate's ``Accelerator`` for this process and the others."""
    return Accelerator(cpu=_on_the_cpu())


def shard_on_the_cpu() -> None:
    """Let FSDP be looked at without a GPU, in a process launched with ``fsdp.yaml``. Call it before training.

    Accelerate shards on GPUs only. It is told here that the CPU is one; all that follows is what a GPU would do.
    """
    new_accelerator()
    AcceleratorState().fsdp_plugin = FullyShardedDataParallelPlugin()  # as the launch's configuration says
    process_state().distributed_type = DistributedType.FSDP


def count_targets(rows: Sequence[dict[str, Any]]) -> int:
    """How many answers the loss asks for: tokens of a text (the first is never predicted), or rows with one label."""
    labels = [row["labels"][1:] if isinstance(row["labels"], list) else [row["labels"]] for row in rows]
    return sum(label != IGNORED for each in labels for label in each)


def split_batch(rows: Sequence[dict[str, Any]], index: int, processes: int) -> tuple[Sequence[dict[str, Any]], float]:
    """The rows of a batch that process ``index`` takes, and the factor for its mean loss over them.

    The gradients are averaged over the P processes. With n of the batch's N asked tokens, the factor P·n/N makes that
    average the gradient of the mean over all N tokens, however unevenly they fall: (1/P) Σ (P·n/N) · (loss sum)/n.

    A share that asks for nothing would have the mean of nothing, NaN. It gets a row that asks, and the factor 0.
    """
    own, everything = rows[index::processes], count_targets(rows)
    if everything and not count_targets(own):
        own, here = [next(row for row in rows if count_targets([row]))], 0
    else:
        here = count_targets(own)
    return own, processes * here / everything if everything else 1.0


def broadcast_from_main(value: Anything) -> Anything:
    """What the main process has here, in every process. All of them must call this, in the same order."""
    process_state()
    return broadcast_object_list([value])[0]


def own_gpu() -> list[int]:
    """The GPU that this process computes on, as a list; empty without one."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def home_device(model: nn.Module, accelerator: Accelerator) -> torch.device | None:
    """The device on which the whole model is, to which it comes back; None if it is spread over several.

    Warns if that is a GPU, and the training will not be there.
    """
    found = {p.device for p in model.parameters()}
    home = found.pop() if len(found) == 1 else None
    if home is not None and home.type not in ("cpu", "meta") and accelerator.device.type == "cpu":
        warnings.warn(
            f"the model is on {home} and trains on the CPU, as a quick run does: set LORA_EDU_RUN=full to use the GPU",
            stacklevel=3,
        )
    return home


def shards(accelerator: Accelerator) -> bool:
    """Whether the weights are to be sharded (FSDP), rather than held by every process.

    Raises:
        ValueError: for the first version of FSDP, which flattens a layer's frozen and trained weights into one.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    if not accelerator.is_fsdp2:
        raise ValueError(
            "fsdp_version: 1: train needs 2; set it in your configuration, or take data/accelerate/fsdp.yaml"
        )
    return True


def copy_to_shard(model: nn.Module) -> nn.Module:
    """A copy of the modules to be sharded in place of the caller's, which stay plain.

    The frozen weights share the caller's memory until they are sharded; trained weights are copied.
    """
    known = {}
    for p in model.parameters():
        weight = p.detach().clone() if p.requires_grad else p.detach()
        known[id(p)] = nn.Parameter(weight, requires_grad=p.requires_grad)
    return copy.deepcopy(model, known)


@torch.no_grad()
def copy_back(sharded: nn.Module, model: nn.Module) -> None:
    """Gather what was trained from the shards and put it into the caller's model, in every process."""
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation, the last layers may still be gathered
    found: dict[str, Tensor] = {**dict(sharded.named_parameters()), **dict(sharded.named_buffers())}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, tensor in [*trained, *model.named_buffers()]:
        value = found[name]
        tensor.copy_(value.full_tensor() if isinstance(value, DTensor) else value)
