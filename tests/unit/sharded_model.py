"""FSDP's ``fully_shard`` around an injected model, for test_distributed.py: what works, and what is refused.

``python tests/unit/sharded_model.py FOLDER`` prints a word for each part that holds.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lora_edu import (
    LoraConfig,
    adapter_names,
    disable_adapter,
    hotswap_adapter,
    inject,
    list_adapters,
    load_adapter,
    load_base,
    merge,
    merge_and_unload,
    save_adapter,
    set_adapter,
)
from lora_edu.lab.diagnose import check_called

IDS = torch.tensor([[5, 6, 7, 8]])


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def refused(call, message):
    """Whether the call says so."""
    try:
        call()
    except ValueError as error:
        return message in str(error)
    return False


def main(folder):
    model, _ = load_base("tiny")
    right = {"base": logits(model)}
    drawn = {"r": 2, "init_lora_weights": False}
    inject(model, LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["norm"], **drawn), "a")
    inject(model, LoraConfig(target_modules=["q_proj"], **drawn), "b")
    for name in ("b", "a"):
        set_adapter(model, name)
        right[name] = logits(model)
    save_adapter(model, folder / "whole", "a")
    mesh = init_device_mesh("cpu", (1,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())

    assert list_adapters(model) == ["a", "b"]
    print("listed")
    for name in ("a", "b", "a"):
        set_adapter(model, name)
        assert torch.equal(logits(model), right[name])
    print("switched")
    with disable_adapter(model):
        assert torch.equal(logits(model), right["base"])
    assert torch.equal(logits(model), right["a"])
    print("disabled")
    with adapter_names(model, ["b"]):
        assert torch.equal(logits(model), right["b"])
    print("mixed")
    assert check_called(model, {"input_ids": IDS}) == []
    print("called")
    save_adapter(model, folder / "sharded", "a")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / "sharded" / file).read_bytes() == (folder / "whole" / file).read_bytes()
    print("saved")
    layer = model.model.layers[0].self_attn.q_proj
    for call in (lambda: merge(model), lambda: merge_and_unload(model), layer.merge, layer.effective_weight):
        assert refused(call, "sharded over several processes (FSDP): merge in a model that is not")
    for call in (
        lambda: inject(model, LoraConfig(target_modules=["k_proj"]), "c"),
        lambda: load_adapter(model, folder / "whole", "c"),
        lambda: hotswap_adapter(model, folder / "whole", "a"),
    ):
        assert refused(call, "inject or load adapters before fully_shard(model)")
    assert list_adapters(model) == ["a", "b"]
    assert torch.equal(logits(model), right["a"])
    print("refused")


if __name__ == "__main__":
    where = Path(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{where / 'group'}", rank=0, world_size=1)
    main(where)
    dist.destroy_process_group()
