"""Time and memory of a LoRA step of a 7B-shaped Llama, by every way to take it, for lesson 21. Needs a GPU of 141 GB.

    python benchmarks/speed_7b.py --shape 4x512        # adds that shape to data/runs/speed_7b.json
    python benchmarks/speed_7b.py --toy --out x.json   # the same code on a tiny shape, on any machine

LoRA of r = 16 on all linear layers against full fine-tuning, all in bfloat16, with random weights: times do not depend
on their values. All ways stand on the same frozen weights in one process and take a step in turns, so that a
disturbance meets all of them; what counts are the ratios of each round. PEFT is compared where it is installed. A
captured step is one CUDA graph: forward, backward and optimizer replayed as they were recorded.
"""

import argparse
import copy
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from memory_7b import CUDA, DEVICE, SEED, allocated, ceiling, peak, reset_peak, synchronize
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_edu import LoraConfig, inject
from lora_edu.lab.records import surroundings, write_record
from lora_edu.measure import paired_times

try:
    import peft
except ImportError:
    peft = None

warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
ROOT = Path(__file__).resolve().parents[1]
R = 16
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, compiled": {"compile": True},
    "peft, fp32 adapter": {"lora": "peft", "autocast_adapter_dtype": True},
    "peft": {"lora": "peft"},
    "plain": {"lora": "ours"},
    "fast": {"lora": "ours", "fast": True},
    "plain, compiled": {"lora": "ours", "compile": True},
    "fast, compiled": {"lora": "ours", "fast": True, "compile": True},
    "fast, captured": {"lora": "ours", "fast": True, "capture": True},
    "plain, compiled and captured": {"lora": "ours", "compile": True, "capture": True},
    "fast, compiled and captured": {"lora": "ours", "fast": True, "compile": True, "capture": True},
}
TOY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}


def new_base(config: LlamaConfig) -> LlamaForCausalLM:
    """A model with random weights in bfloat16."""
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with DEVICE:
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(torch.float32)


def on_the_same_weights(base: nn.Module) -> Any:
    """A copy of the model whose parameters are others but share the memory of the base's."""
    memo = {id(p): nn.Parameter(p.data, requires_grad=False) for p in base.parameters()}
    return copy.deepcopy(base, memo)


class Step:
    """One way's model and optimizer; a call takes one training step and returns its loss."""

    def __init__(self, base: nn.Module, way: dict[str, Any], ids: Tensor):
        before = allocated()
        self.ids = ids
        self.model = on_the_same_weights(base)
        torch.manual_seed(SEED)
        autocast = way.get("autocast_adapter_dtype", False)
        settings: dict[str, Any] = {"r": R, "lora_alpha": R, "target_modules": "all-linear"}
        if way.get("lora") == "peft":
            self.model = peft.get_peft_model(self.model, peft.LoraConfig(**settings), autocast_adapter_dtype=autocast)
        elif way.get("lora") == "ours":
            inject(self.model, LoraConfig(**settings), autocast_adapter_dtype=autocast, fast=way.get("fast", False))
        else:
            self.model.requires_grad_(True)
        if way.get("compile"):
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=CUDA, capturable=CUDA)
        self.losses: list[Tensor] = []
        self.run: Callable[[], Tensor] = self.eager
        for _ in range(3):  # compiles, and creates the optimizer's state
            self.eager()
        synchronize()
        self.held = allocated() - before  # adapters and moments, above the shared base
        start = allocated()
        reset_peak()
        if way.get("capture") and CUDA:
            self.capture()
        else:
            self.eager()
        synchronize()
        self.peak = self.held + peak() - start

    def eager(self) -> Tensor:
        """Forward, backward, optimizer."""
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def capture(self) -> None:
        """Record one step as a graph; from then on a call replays it, reading ``ids`` and writing the loss in place."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a graph wants a warm-up on another stream than the default one
            for _ in range(3):
                self.eager()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.eager()

        def replay() -> Tensor:
            graph.replay()
            return loss

        self.run = replay

    def __call__(self) -> None:
        loss = self.run()
        synchronize()
        self.losses.append(loss.clone())


def compare(base: Any, names: list[str], batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """One shape: every way's times in turns, its losses and its memory."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(base.config.vocab_size, (batch, tokens), generator=generator).to(DEVICE)
    line: dict[str, Any] = {"batch": batch, "tokens": tokens, "ceiling_tflops": [ceiling()], "failed": {}}
    steps: dict[str, Step] = {}
    for name in names:
        start = time.perf_counter()
        try:
            steps[name] = Step(base, WAYS[name], ids)
            print(f"{batch}×{tokens}  {name}: ready after {time.perf_counter() - start:.0f} s", flush=True)
        except Exception as error:  # a way that this machine or version cannot go is a result too
            line["failed"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"{batch}×{tokens}  {name} failed: {line['failed'][name]}", flush=True)
        gc.collect()
    times = paired_times(steps, rounds, warmup=2)
    line["ceiling_tflops"].append(ceiling())
    weights = sum(p.numel() for p in base.parameters()) - base.get_input_embeddings().weight.numel()
    best = max(line["ceiling_tflops"])
    held = sum(p.numel() * p.element_size() for p in base.parameters())
    line["ways"] = {}
    for name, step in steps.items():
        flops = (4 if "lora" in WAYS[name] else 6) * weights * batch * tokens
        line["ways"][name] = {
            "trainable": step.trainable,
            "steps_ms": [round(1e3 * seconds, 3) for seconds in times.seconds[name]],
            "share_of_ceiling": round(flops / median(times.seconds[name]) / 1e12 / best, 4),
            "against_full": round(times.ratio(name, "full"), 4) if "full" in steps else None,
            "peak_bytes": held + step.peak if CUDA else 0,  # as if it were alone on the device
            "losses": [round(loss.item(), 4) for loss in step.losses[:6]],
        }
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "runs" / "speed_7b.json")
    parser.add_argument("--shape", default="4x512", help="batch x tokens: 1x512, 4x512 or 16x512")
    parser.add_argument("--ways", default=None, help="only these, separated by ';'")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--toy", action="store_true", help="a tiny shape, to try the script")
    arguments = parser.parse_args()
    if not CUDA and not arguments.toy:
        print("speed_7b needs a GPU of 141 GB and found none: nothing was measured (--toy tries the script)")
        return
    names = arguments.ways.split(";") if arguments.ways else list(WAYS)
    if unknown := set(names) - WAYS.keys():
        parser.error(f"--ways: no way {min(unknown)!r}; there are: {'; '.join(WAYS)}")
    batch, tokens = (2, 16) if arguments.toy else map(int, arguments.shape.split("x"))
    torch._dynamo.config.recompile_limit = 64  # every way has compiled layers of its own
    base = new_base(LlamaConfig(**TOY) if arguments.toy else LlamaConfig())
    start = time.perf_counter()
    line = compare(base, names, batch, tokens, arguments.rounds)
    line["command"] = " ".join(["python", "benchmarks/speed_7b.py", *sys.argv[1:]])
    line["machine"] = surroundings("bfloat16")
    line["seconds"] = round(time.perf_counter() - start, 1)
    record: dict[str, Any] = {"what": __doc__.split("\n")[0], "seed": SEED, "r": R, "shapes": []}
    if arguments.out.exists():  # another shape, or other ways of this one that did not fit beside the first
        record = json.loads(arguments.out.read_text(encoding="utf-8"))
    same = (batch, tokens, names)
    record["shapes"] = [each for each in record["shapes"] if (each["batch"], each["tokens"], each["asked"]) != same]
    record["shapes"].append(line | {"asked": names})
    write_record(record, arguments.out)
    for name, way in line["ways"].items():
        against = "" if way["against_full"] is None else f"{way['against_full']:.3f} of full"
        print(
            f"{batch}×{tokens}  {name:28} {median(way['steps_ms']):8.2f} ms  {against:14} "
            f"{way['share_of_ceiling']:.3f} of the ceiling  {way['peak_bytes'] / 2**30:.2f} GiB"
        )


if __name__ == "__main__":
    main()
