"""Peak memory and time of one training step of a 7B-shaped Llama, for lesson 06. Needs a GPU of 80 GB or more.

    python benchmarks/memory_7b.py                     # writes data/runs/memory_7b.json, two to four minutes on an H200
    python benchmarks/memory_7b.py --toy --out x.json  # the same code on a tiny shape, on any machine

The weights are random: neither bytes nor times depend on their values. Each method gets a fresh model, each line of the
table fresh adapters, gradients and optimizer. The file is written anew after every line, whole or not at all. The
record keeps every timed step, the memory after each phase of one step, and the peak inside each phase.
"""

import argparse
import gc
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_edu import LoraConfig, inject, merge_and_unload
from lora_edu.lab.records import commit, write_record

warnings.filterwarnings("ignore", message="`gradient_checkpointing_")

SEED = 0
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
QV = ["q_proj", "v_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "full, all bf16": {"moments": "bfloat16"},
    "lora q,v r=8": {"targets": QV, "r": 8},
    "lora all-linear r=16": {"targets": "all-linear", "r": 16},
    "lora all-linear r=64": {"targets": "all-linear", "r": 64},
    "full, fp32 moments": {"moments": "float32"},
    "lora all-linear r=16, fp32 adapter": {"targets": "all-linear", "r": 16, "adapter": "float32"},
    "full, fp32 moments and master": {"moments": "float32", "master": True},
}
CONFIG = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"]
SHAPES = [(1, 512), (4, 512), (16, 512)]


class Float32States(torch.optim.Optimizer):
    """AdamW without decay for bf16 weights, with float32 moments and, if asked for, a float32 master copy."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, master: bool = False):
        super().__init__(params, {"lr": lr})
        self.master, self.count = master, 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.count += 1
        correct1, correct2 = 1 - 0.9**self.count, 1 - 0.999**self.count
        for group in self.param_groups:
            for p in group["params"]:
                state, grad = self.state[p], p.grad.float()
                if not state:
                    state["m"], state["v"] = torch.zeros_like(grad), torch.zeros_like(grad)
                    if self.master:
                        state["master"] = p.float()
                state["m"].lerp_(grad, 0.1)
                state["v"].mul_(0.999).addcmul_(grad, grad, value=0.001)
                del grad  # each parameter's temporaries are freed before the next one's
                scale = state["v"].sqrt().div_(correct2**0.5).add_(1e-8)
                weight = state["master"] if self.master else p.float()
                p.copy_(weight.addcdiv_(state["m"], scale, value=-group["lr"] / correct1))


def synchronize() -> None:
    """Wait until the device has done what it was asked to do."""
    if CUDA:
        torch.cuda.synchronize()


def allocated() -> int:
    """Bytes of live tensors on the device."""
    return torch.cuda.memory_allocated() if CUDA else 0


def peak() -> int:
    """The highest ``allocated()`` since the last call of ``reset_peak``."""
    return torch.cuda.max_memory_allocated() if CUDA else 0


def used() -> int:
    """Bytes of the GPU's memory in use, by whomever."""
    if not CUDA:
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def reset_peak() -> None:
    """Let ``peak`` start anew from what is allocated now."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()


def empty() -> None:
    """Free what nothing refers to any more, also in PyTorch's cache."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def new_model(config: LlamaConfig) -> LlamaForCausalLM:
    """A model with random weights in bfloat16, in training mode, all of it frozen."""
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with DEVICE:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.train().requires_grad_(False)


def clean(model: nn.Module, method: dict[str, Any]) -> None:
    """Take the adapters off, drop the gradients, freeze everything, and free what nothing refers to any more."""
    if "targets" in method:
        merge_and_unload(model)
    model.requires_grad_(False)
    for p in model.parameters():
        p.grad = None
    empty()


def prepare(model: nn.Module, method: dict[str, Any]) -> torch.optim.Optimizer:
    """Make trainable what the method trains, with fresh adapters, and return a fresh optimizer for it."""
    if "targets" in method:
        torch.manual_seed(SEED)
        lora = LoraConfig(r=method["r"], lora_alpha=method["r"], target_modules=method["targets"])
        inject(model, lora, autocast_adapter_dtype=method.get("adapter") == "float32")
    else:
        model.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    if method.get("moments") == "float32":
        return Float32States(trained, lr=1e-5, master=method.get("master", False))
    return torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=CUDA)


def measure(
    model: Any, method: dict[str, Any], batch: int, tokens: int, checkpointing: bool, steps: int, warmup: int
) -> dict[str, Any]:
    """One line of the table: median time of a step, peak memory, and the memory after each phase of a step."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(model.config.vocab_size, (batch, tokens), generator=generator).to(DEVICE)
    optimizer = prepare(model, method)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def forward() -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def one_step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(warmup):
        one_step()
    synchronize()
    reset_peak()
    milliseconds = []
    for _ in range(steps):
        start = time.perf_counter()
        one_step()
        synchronize()
        milliseconds.append(round(1e3 * (time.perf_counter() - start), 2))
    result: dict[str, Any] = {
        "trainable": trainable,
        "step_ms": round(statistics.median(milliseconds), 2),
        "steps_ms": milliseconds,
        "peak_bytes": peak(),
        "reserved_bytes": torch.cuda.max_memory_reserved() if CUDA else 0,  # PyTorch's cache: what it took from the GPU
        "device_used_bytes": used(),  # the same and the driver's own: what nvidia-smi shows
    }
    phases: dict[str, Any] = {"before": {"allocated": allocated()}}
    loss: Tensor | None = None
    for name in ("forward", "backward", "step"):
        reset_peak()
        start = time.perf_counter()
        if name == "forward":
            loss = forward()
        elif name == "backward":
            assert loss is not None
            loss.backward()
        else:
            optimizer.step()
        synchronize()
        took = round(1e3 * (time.perf_counter() - start), 2)
        phases[name] = {"allocated": allocated(), "peak": peak(), "ms": took}
    result["loss"] = round(float(loss.detach()), 4) if loss is not None else None
    result["phases"] = phases
    return result


def ceiling() -> float:
    """TFLOP/s of a bf16 matrix product 2048×4096×11008 (tiny without a GPU) on random data: the best of six rounds."""
    m, k, n, products = (2048, 4096, 11008, 20) if CUDA else (64, 64, 64, 1)
    a = torch.randn(m, k, dtype=torch.bfloat16, device=DEVICE)
    b = torch.randn(k, n, dtype=torch.bfloat16, device=DEVICE)
    best = 0.0
    for _ in range(6):
        synchronize()
        start = time.perf_counter()
        for _ in range(products):
            a @ b
        synchronize()
        best = max(best, products * 2 * m * k * n / (time.perf_counter() - start) / 1e12)
    return round(best, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "data" / "runs" / "memory_7b.json")
    parser.add_argument("--toy", action="store_true", help="a tiny shape, to try the script")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600, help="start no further line after so many seconds")
    parser.add_argument("--commit", default=None, help="what to record as the commit, where git cannot tell")
    arguments = parser.parse_args()
    if not CUDA and not arguments.toy:
        print("memory_7b needs a GPU of 80 GB or more and found none: nothing was measured (--toy tries the script)")
        return
    start = time.perf_counter()
    config, shapes = LlamaConfig(), SHAPES
    if arguments.toy:
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(**small, vocab_size=256)
        shapes = [(1, 16), (2, 16)]
    device = torch.cuda.get_device_properties(0) if CUDA else None
    record: dict[str, Any] = {
        "what": "one training step: peak memory and time; random weights in bf16, SDPA attention, no dropout",
        "command": " ".join(["python", "benchmarks/memory_7b.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": arguments.commit or commit(),
        "hardware": f"{device.name}, {device.total_memory / 2**30:.0f} GiB" if device else platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cuda": torch.version.cuda,
        },
        "seed": SEED,
        "config": {name: getattr(config, name) for name in CONFIG},
        "steps": arguments.steps,
        "warmup": arguments.warmup,
        "ceiling_tflops": [ceiling()],
        "runs": [],
    }

    def out_of_time() -> bool:  # never before the first line, however slowly the machine starts
        return bool(record["runs"]) and time.perf_counter() - start > arguments.seconds

    for name, method in METHODS.items():
        if out_of_time():
            print("no time left for", name)
            continue
        model = new_model(config)
        record["parameters"] = sum(p.numel() for p in model.parameters())
        weights = allocated()
        for batch, tokens in shapes:
            for checkpointing in (False, True):
                if out_of_time():
                    continue
                line = {"method": name, "batch": batch, "tokens": tokens, "checkpointing": checkpointing}
                try:
                    line |= measure(model, method, batch, tokens, checkpointing, arguments.steps, arguments.warmup)
                except torch.OutOfMemoryError:
                    line["out_of_memory"] = True
                clean(model, method)
                line["left_over_bytes"] = allocated() - weights
                record["runs"].append(line)
                record["seconds"] = round(time.perf_counter() - start, 1)
                write_record(record, arguments.out)
                print(
                    f"{record['seconds']:6.1f} s  {name:36} {batch:2}×{tokens} {'ckpt' if checkpointing else '    '}  "
                    f"{line.get('step_ms', 'out of memory')} ms  {line.get('peak_bytes', 0) / 2**30:.2f} GiB  "
                    f"left {line['left_over_bytes']}",
                    flush=True,
                )
        del model
        empty()
    record["ceiling_tflops"].append(ceiling())
    write_record(record, arguments.out)


if __name__ == "__main__":
    main()
