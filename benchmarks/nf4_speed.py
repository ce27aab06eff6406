"""Four bits on a GPU: NF4 dequantisation and a QLoRA step of 7B shape beside bitsandbytes, for lesson 14. Needs a GPU.

    python benchmarks/nf4_speed.py                              # all parts, into data/runs/nf4_speed.json
    python benchmarks/nf4_speed.py --parts memory --shapes 70b  # one part, in place of its lines there
    python benchmarks/nf4_speed.py --toy --out x.json           # the same code on tiny shapes, on any machine

dequantise: the seven weights of a 7B block, with double quantisation, become bfloat16. The limit is the bytes that are
read and written over the bandwidth of a copy that takes its turns with them; on a GPU every way is a CUDA graph, so
that no launch counts.
steps: LoRA of r = 16 on all linear layers of a 7B shape, bfloat16 adapters, random weights; all ways stand in one
process and take a step in turns.
memory: 7B, 13B and 70B one after another, 1×512 with checkpointing, float32 adapters: bytes of the model, and the peak
of a step.
bitsandbytes, with PEFT's adapters as people use it, is compared where both are installed; elsewhere the record says
that it is not. A way that fails is recorded with its reason.
"""

import argparse
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from memory_7b import (
    CUDA,
    DEVICE,
    SEED,
    SHAPES,
    TOY,
    TOY_SHAPES,
    TrainingStep,
    allocated,
    bitsandbytes_layer,
    empty,
    new_model,
    new_quantised_model,
    peak,
    reset_peak,
)
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_edu import LoraConfig, inject
from lora_edu.counting.measure import paired_times
from lora_edu.counting.memory import training_memory
from lora_edu.counting.meta import load_config, meta_model
from lora_edu.fast.steps import capture_step, causal_attention, compile_blocks
from lora_edu.lab.recording.records import surroundings, write_record
from lora_edu.nf4 import dequantize_nf4, quantize_nf4
from lora_edu.variants.four_bit_base import NF4Linear

OUT = Path(__file__).resolve().parents[1] / "data" / "runs" / "nf4_speed.json"
PARTS = ("dequantise", "steps", "memory")
BATCHES = [(1, 512), (4, 512), (16, 512)]
R = 16
WAYS: dict[str, dict[str, Any]] = {  # base: 16 or whose four bits; lora: whose adapters
    "bitsandbytes": {"base": "bitsandbytes", "lora": "peft"},
    "bitsandbytes, compiled": {"base": "bitsandbytes", "lora": "peft", "compile": True},
    "bitsandbytes, our adapters": {"base": "bitsandbytes", "lora": "ours"},
    "ours": {"base": "ours", "lora": "ours"},
    "ours, compiled": {"base": "ours", "lora": "ours", "compile": True},
    "ours, compiled and captured": {"base": "ours", "lora": "ours", "compile": True, "capture": True},
    "16 bits": {"base": "16", "lora": "ours"},
    "16 bits, compiled": {"base": "16", "lora": "ours", "compile": True},
}
AGAINST = "bitsandbytes"


def there() -> bool:
    """Whether bitsandbytes and PEFT can be compared with."""
    return bool(find_spec("bitsandbytes") and find_spec("peft"))


def our_layer(layer: nn.Linear) -> nn.Module:
    """The layer in NF4 with double quantisation, by lora_edu."""
    return NF4Linear(quantize_nf4(layer.weight, double_quant=True))


def new_base(kind: str, config: LlamaConfig) -> LlamaForCausalLM:
    """A model with random weights, in 16 bits or in four."""
    if kind == "16":
        return new_model(config)
    return new_quantised_model(config, our_layer if kind == "ours" else bitsandbytes_layer)


def adapt(model: Any, whose: str, wide: bool) -> None:
    """LoRA on all linear layers, in place."""
    torch.manual_seed(SEED)
    settings: dict[str, Any] = {"r": R, "lora_alpha": R, "target_modules": "all-linear"}
    if whose == "peft":
        import peft

        peft.get_peft_model(model, peft.LoraConfig(**settings), autocast_adapter_dtype=wide)
    else:
        inject(model, LoraConfig(**settings), autocast_adapter_dtype=wide)


def reason(error: BaseException) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def graph_of(function: Callable[[], Any]) -> Callable[[], None]:
    """The function as one CUDA graph, so that its time is the GPU's; without a GPU the function itself."""
    if not CUDA:
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def dequantise(config: LlamaConfig, rounds: int) -> dict[str, Any]:
    """Times of the seven weights of one block on their way to bfloat16, against the bandwidth of a copy."""
    d, m = config.hidden_size, config.intermediate_size
    generator = torch.Generator(DEVICE).manual_seed(SEED)
    shapes = [(d, d)] * 4 + [(m, d)] * 2 + [(d, m)]
    weights = [torch.randn(shape, generator=generator, device=DEVICE).bfloat16() for shape in shapes]
    states = [quantize_nf4(weight, double_quant=True) for weight in weights]
    layers = [NF4Linear(state) for state in states]
    numbers = sum(weight.numel() for weight in weights)
    moved = sum(state.nbytes for state in states) + 2 * numbers
    source = torch.zeros(2**28 if CUDA else 2**16, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    ways: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "ours": lambda: [dequantize_nf4(state) for state in states],
        "ours, in the layer": lambda: [layer.weight for layer in layers],
    }
    if there():
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        theirs = [quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True) for weight in weights]
        ways["bitsandbytes"] = lambda: [dequantize_4bit(*each) for each in theirs]
    ready: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    differences: dict[str, float] = {}
    for name, way in ways.items():
        try:
            found = way()
            if name != "copy":
                pairs = zip(found, ways["ours"](), strict=True)
                differences[name] = max(float((one - other).abs().max()) for one, other in pairs)
            ready[name] = graph_of(way)
        except Exception as exception:
            failed[name] = reason(exception)
            print(f"  {name} failed: {failed[name]}", flush=True)
    times = paired_times(ready, rounds, warmup=2)
    bandwidth = 2 * source.nbytes / median(times.seconds["copy"])
    lines = {}
    for name in ready:
        seconds = times.seconds[name]
        limit = (2 * source.nbytes if name == "copy" else moved) / bandwidth
        lines[name] = {"ms": [round(1e3 * each, 4) for each in seconds], "of_limit": round(limit / median(seconds), 4)}
        print(f"  {name:16} {1e3 * median(seconds):8.3f} ms  {lines[name]['of_limit']:.3f} of the limit", flush=True)
    return {
        "shapes": shapes, "numbers": numbers, "bytes": moved, "copied_bytes": 2 * source.nbytes,
        "bytes_per_second": round(bandwidth), "ways": lines, "failed": failed, "largest_difference": differences,
    }  # fmt: skip


class Step(TrainingStep):
    """One way's model and optimizer; a call takes one training step and keeps its loss."""

    def __init__(self, way: dict[str, Any], config: LlamaConfig, ids: Tensor, pool: Any):
        super().__init__(ids)
        start = allocated()
        self.model = new_base(way["base"], config)
        adapt(self.model, way["lora"], wide=False)
        if way.get("compile"):
            compile_blocks(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=CUDA, capturable=CUDA)
        for _ in range(3):  # compiles, and creates the optimizer's state
            self.eager()
        empty()
        reset_peak()
        self.eager()
        self.peak = peak() - start
        if way.get("capture") and CUDA:
            self.run = capture_step(self.eager, pool=pool)


def steps(config: LlamaConfig, batch: int, tokens: int, rounds: int, names: list[str]) -> dict[str, Any]:
    """The ways' times of one shape in turns, their losses and their memory."""
    print(f"{batch}×{tokens}", flush=True)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(config.vocab_size, (batch, tokens), generator=generator).to(DEVICE)
    ready: dict[str, Step] = {}
    failed: dict[str, str] = {}
    pool = torch.cuda.graph_pool_handle() if CUDA else None
    for name in sorted(names, key=lambda name: "capture" in WAYS[name]):  # captures last: one that fails spoils others
        try:
            ready[name] = Step(WAYS[name], config, ids, pool)
        except Exception as exception:
            failed[name] = reason(exception)
            print(f"  {name} failed: {failed[name]}", flush=True)
        empty()
    times = paired_times({name: ready[name] for name in ready}, rounds, warmup=2)
    lines = {}
    for name, step in ready.items():
        against = {other: round(times.ratio(name, other), 4) for other in (AGAINST, "16 bits") if other in ready}
        lines[name] = {
            "trainable": step.trainable,
            "steps_ms": [round(1e3 * seconds, 3) for seconds in times.seconds[name]],
            "against": against,
            "peak_bytes": step.peak,
            "losses": [round(loss.item(), 4) for loss in step.losses[:4]],
        }
        ratios = ", ".join(f"{ratio:.3f} of {other}" for other, ratio in against.items())
        print(f"  {name:28} {median(lines[name]['steps_ms']):8.2f} ms  {ratios}", flush=True)
    return {"batch": batch, "tokens": tokens, "ways": lines, "failed": failed}


def memory(shape: str, config: LlamaConfig, whose: str, tokens: int) -> dict[str, Any]:
    """Bytes of one model in four bits, and the peak of a step of 1 × tokens with checkpointing."""
    line: dict[str, Any] = {"shape": shape, "way": whose, "batch": 1, "tokens": tokens}
    where = {"r": R, "target_modules": "all-linear", "batch": 1, "tokens": tokens, "checkpointing": True}
    line["predicted_bytes"] = round(training_memory(meta_model(config), "qlora", "nf4-dq", **where).peak)
    empty()
    start = allocated()
    try:
        model: Any = new_base(whose, config)
        line["model_bytes"] = allocated() - start
        adapt(model, "ours" if whose == "ours" else "peft", wide=True)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trained = [p for p in model.parameters() if p.requires_grad]
        line["trainable"] = sum(p.numel() for p in trained)
        optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=CUDA)
        ids = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(SEED)).to(DEVICE)
        for _ in range(2):
            empty()
            reset_peak()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        line |= {"peak_bytes": peak() - start, "loss": round(loss.item(), 4)}
    except Exception as exception:
        line["failed"] = reason(exception)
    found = (
        line.get("failed") or f"model {line['model_bytes'] / 2**30:.2f} GiB, peak {line['peak_bytes'] / 2**30:.2f} GiB"
    )
    print(f"  {shape:4} {whose:13} {found}", flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="of the part memory")
    parser.add_argument("--ways", help="of the part steps: only these, separated by ';'")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--toy", action="store_true", help="tiny shapes, to try the script")
    arguments = parser.parse_args()
    if not CUDA and not arguments.toy:
        print("nf4_speed needs a GPU and found none: nothing was measured (--toy tries the script)")
        return
    names = arguments.ways.split(";") if arguments.ways else list(WAYS)
    if unknown := set(names) - WAYS.keys():
        parser.error(f"--ways: no way {min(unknown)!r}; there are: {'; '.join(WAYS)}")
    if not there():
        print("bitsandbytes and PEFT are not both installed: there is nothing to compare with", flush=True)
        names = [name for name in names if WAYS[name]["base"] != "bitsandbytes"]
    torch._dynamo.config.recompile_limit = 64  # every way has compiled blocks of its own
    tokens = 16 if arguments.toy else 512
    attention = {"attn_implementation": causal_attention()}
    configs = {
        shape: LlamaConfig(**TOY | TOY_SHAPES[shape] | attention) if arguments.toy else load_config(SHAPES[shape])
        for shape in SHAPES
    }
    configs["7b"]._attn_implementation = "causal"
    machine = surroundings("bfloat16")
    for package in ("bitsandbytes", "peft"):
        machine["versions"][package] = version(package) if find_spec(package) else None
    about = {"command": " ".join(["python", "benchmarks/nf4_speed.py", *sys.argv[1:]]), "rounds": arguments.rounds}
    about |= {"machine": machine}
    record: dict[str, Any] = {"what": __doc__.split("\n")[0], "seed": SEED, "r": R}
    if arguments.out.exists():
        record = json.loads(arguments.out.read_text(encoding="utf-8"))
    for part in arguments.parts:
        print(part, flush=True)
        if part == "dequantise":
            record[part] = dequantise(configs["7b"], arguments.rounds) | about
        elif part == "steps":
            record[part] = []
            for batch, length in [(2, tokens)] if arguments.toy else BATCHES:
                try:
                    line = steps(configs["7b"], batch, length, arguments.rounds, names)
                except torch.OutOfMemoryError as error:  # together they need more than one of them
                    line = {"batch": batch, "tokens": length, "ways": {}, "failed": {"together": reason(error)}}
                record[part].append(line | about)
                write_record(record, arguments.out)  # a later shape may run out of memory or time
                torch.compiler.reset()
                empty()
        else:
            kept = [line for line in record.get(part, []) if line["shape"] not in arguments.shapes]
            record[part] = kept
            for shape in arguments.shapes:
                for whose in ("ours", "bitsandbytes") if there() else ("ours",):
                    record[part].append(memory(shape, configs[shape], whose, tokens) | about)
                    write_record(record, arguments.out)
        write_record(record, arguments.out)


if __name__ == "__main__":
    main()
