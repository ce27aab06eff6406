"""Time and memory of a LoRA step of a 7B-shaped Llama, by every way to take it, for lesson 24. Needs a large GPU.

    python benchmarks/speed_7b.py --shape 1x512 4x512  # adds these shapes to data/runs/speed_7b.json
    python benchmarks/speed_7b.py --toy --out x.json   # the same code on a tiny shape, on any machine

LoRA of r = 16 on all linear layers against full fine-tuning, all in bfloat16, with random weights: times do not depend
on their values. All ways stand on the same weights in one process and take a step in turns, so that a disturbance
meets all of them; what counts are the ratios of each round. PEFT is compared where it is installed; Unsloth, in a
process of its own, where it is installed and asked for by --ways. A captured step is one CUDA graph: forward, backward
and optimizer replayed as they were recorded. Above 4,096 tokens a step those ways are left out, unless asked for, whose
memory would not fit beside the rest.
On a GPU of 141 GB all else fits. A smaller one leaves out, by the estimate of lora_edu.counting.memory, what does not
fit alone or beside the others, keeping full fine-tuning and then the ways that need least; the record says so under
"skipped". A way that runs out of memory all the same is "failed", and the others go on.
The record is written after every shape; started again at the same commit, the same command skips those that are there.
After every way that is ready it also holds, as "unfinished", how far the shape has come.
"""

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from memory_7b import (
    CUDA,
    DEVICE,
    SEED,
    TrainingStep,
    allocated,
    capacity,
    ceiling,
    empty,
    peak,
    reset_peak,
    synchronize,
    used,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from unsloth_step import UnslothStep, installed

from lora_edu import LoraConfig, inject
from lora_edu.counting.measure import PairedTimes, paired_times
from lora_edu.counting.memory import MemoryEstimate, training_memory
from lora_edu.fast.steps import capture_step, causal_attention, compile_blocks
from lora_edu.lab.recording.records import surroundings, write_record

try:
    import peft
except ImportError:
    peft = None

warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
ROOT = Path(__file__).resolve().parents[1]
R = 16
ALL_UP_TO = 4096  # tokens a step; above, all but the large ones, which need the most memory
AUTOTUNED = "max-autotune-no-cudagraphs"
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, compiled": {"compile": True},
    "peft, fp32 adapter": {"lora": "peft", "autocast_adapter_dtype": True, "large": True},
    "peft": {"lora": "peft"},
    "plain": {"lora": "ours"},
    "fast": {"lora": "ours", "fast": True},
    "plain, compiled": {"lora": "ours", "compile": True},
    "fast, compiled": {"lora": "ours", "fast": True, "compile": True},
    "fast, captured": {"lora": "ours", "fast": True, "capture": True, "large": True},
    "plain, compiled and captured": {"lora": "ours", "compile": True, "capture": True},
    "fast, compiled and captured": {"lora": "ours", "fast": True, "compile": True, "capture": True},
    "full, compiled and captured": {"compile": True, "capture": True, "large": True},
    # The compiler tries several kernels for each product, some of which add LoRA's update on the way: minutes more.
    "plain, autotuned and captured": {"lora": "ours", "compile": True, "capture": True, "mode": AUTOTUNED},
    # What PEFT does by default, and what full fine-tuning is where small updates are not to be lost.
    "plain, fp32 adapter, compiled": {"lora": "ours", "autocast_adapter_dtype": True, "compile": True, "extra": True},
    "fast, fp32 adapter, compiled and captured": {
        "lora": "ours", "fast": True, "autocast_adapter_dtype": True, "compile": True, "capture": True, "extra": True,
    },
    "full, fp32 states": {"float32": True, "extra": True},
    "full, fp32 states, compiled": {"float32": True, "compile": True, "extra": True},
    "unsloth, fp32 adapter": {"lora": "unsloth", "autocast_adapter_dtype": True, "extra": True},
    "unsloth": {"lora": "unsloth", "extra": True},
}  # fmt: skip
COMPILED = 0.75  # of eager activations: 0.69 to 0.75 in the record
SPARE = 0.05  # of the memory, for CUDA's context and what PyTorch keeps in pieces
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


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Step(TrainingStep):
    """One way's model and optimizer; a call takes one training step and keeps its loss.

    Args:
        base: the model whose weights all ways share.
        way: one of WAYS.
        ids: the batch, (rows, tokens).
        full: an earlier step that trains the weights themselves. One more shares its moments, as it shares the weights:
            that saves 25 GiB.
        pool: the memory that captured steps share.
    """

    def __init__(self, base: nn.Module, way: dict[str, Any], ids: Tensor, full: "Step | None", pool: Any):
        super().__init__(ids)
        self.autocast = way.get("float32", False)
        # Float32 weights are their own master copy: autocast computes in bfloat16, and the update is not rounded.
        self.model = copy.deepcopy(base).float() if self.autocast else on_the_same_weights(base)
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
            compile_blocks(self.model, mode=way.get("mode"))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in self.trained)
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0, fused=CUDA, capturable=CUDA)
        if full and "lora" not in way and not self.autocast:
            for p, same in zip(self.trained, full.trained, strict=True):
                self.optimizer.state[p] = full.optimizer.state[same]
        for _ in range(3):  # compiles, and creates the optimizer's state
            self.eager()
        synchronize()
        start = allocated()
        reset_peak()
        if way.get("capture") and CUDA:
            self.run = capture_step(self.eager, pool=pool)
        self()
        weights = [*(self.model if self.autocast else base).parameters(), *(self.trained if "lora" in way else [])]
        moments = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        self.peak = nbytes([*weights, *moments]) + peak() - start  # as if alone on the device

    def close(self) -> None:
        """Nothing to end: this step runs in our own process."""


def new_step(
    base: Any, way: dict[str, Any], ids: Tensor, full: Step | None, pool: Any, folder: Path
) -> Step | UnslothStep:
    """The step of one way; ``folder`` is room for the base on disk, for a way in a process of its own."""
    if way.get("lora") != "unsloth":
        return Step(base, way, ids, full, pool)
    if installed() is None:
        raise ModuleNotFoundError("unsloth is not installed")
    if not (folder / "config.json").exists():
        base.save_pretrained(folder)
        AutoTokenizer.from_pretrained(ROOT / "data" / "tiny").save_pretrained(folder)  # it asks for one
    return UnslothStep(folder, ids, R, bf16=not way.get("autocast_adapter_dtype"))


def estimate(base: nn.Module, way: dict[str, Any], batch: int, tokens: int) -> MemoryEstimate:
    """What the way needs at its peak if it is alone on the device; right to 1 % for what is recorded, 5 % compiled."""
    recipe = ("full", "bf16")
    if "lora" in way:
        recipe = ("lora", "fp32-adapter" if way.get("autocast_adapter_dtype") else "bf16")
    found = training_memory(base, *recipe, r=R, target_modules="all-linear", batch=batch, tokens=tokens)
    activations = (found.activations or 0) * (COMPILED if way.get("compile") or way.get("lora") == "unsloth" else 1)
    if not way.get("float32"):
        return replace(found, activations=activations)
    states = training_memory(base, "full", "fp32")  # beside the base that the others share; autocast keeps its casts
    own = {"adapter": states.base, "moments": states.moments, "gradients": states.gradients}
    return replace(found, **own, activations=activations + found.base)


def together(needs: dict[str, MemoryEstimate]) -> float:
    """Bytes at the highest point of making these ways ready, captured ones last, and of stepping in turns."""
    captures = [name for name in needs if WAYS[name].get("capture")]
    held = pool = highest = eager = shared = 0.0
    for name in [*(name for name in needs if name not in captures), *captures]:
        need = needs[name]
        passing = max(need.gradients, need.activations or 0)
        if WAYS[name].get("lora") == "unsloth":  # a process of its own, with its own weights, gives nothing back
            held, passing = held + need.peak, 0
        elif "lora" in WAYS[name] or WAYS[name].get("float32"):
            held += need.adapter + need.moments
        else:
            shared = need.moments  # all that train the weights themselves share their moments
        highest = max(highest, held + shared + pool + passing)
        if name in captures:
            pool = max(pool, passing)
        else:
            eager = max(eager, passing)
    base = max((need.base for need in needs.values()), default=0.0)
    return base + max(highest, held + shared + pool + eager)


def that_fit(base: nn.Module, names: list[str], batch: int, tokens: int) -> tuple[list[str], dict[str, str]]:
    """The ways that fit on this device together, and the others, with what they need."""
    room = capacity()
    needs = {name: estimate(base, WAYS[name], batch, tokens) for name in names}
    kept: dict[str, MemoryEstimate] = {}
    skipped = {}
    for name in sorted(names, key=lambda name: (name != "full", needs[name].peak)):
        alone, beside = together({name: needs[name]}), together(kept | {name: needs[name]})
        if beside <= room * (1 - SPARE):
            kept[name] = needs[name]
        else:
            bytes_, where = (alone, "") if alone > room * (1 - SPARE) else (beside, " beside the others")
            skipped[name] = f"needs about {bytes_ / 2**30:.0f} GiB{where} of {room / 2**30:.0f}"
    return [name for name in names if name in kept], {name: skipped[name] for name in names if name in skipped}


def reason(error: BaseException) -> str:
    """The error in one line, with the one that began the chain: a capture fails with a last one that says little."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    ends = [error] if first is error else [error, first]
    return ", after ".join(f"{type(each).__name__}: {(str(each).splitlines() or [''])[0]}" for each in ends)


def prepare(
    base: nn.Module,
    names: list[str],
    ids: Tensor,
    tell: Callable[[dict[str, Any]], None] = lambda so_far: None,
    folder: Path = Path(),
) -> tuple[dict[str, Step | UnslothStep], dict[str, Any], dict[str, str]]:
    """The steps that are ready to be timed, what making each ready took, and which ones failed, with the reason.

    Both are told after each way.
    """
    steps: dict[str, Step | UnslothStep] = {}
    ready: dict[str, Any] = {}
    failed: dict[str, str] = {}
    pool = torch.cuda.graph_pool_handle() if CUDA else None
    captures = [name for name in names if WAYS[name].get("capture")]
    for name in [*(name for name in names if name not in captures), *captures, *captures]:
        start, graphs = time.perf_counter(), counters["stats"]["unique_graphs"]
        try:
            if name in steps:  # once more at the end: a capture that failed can have spoilt earlier ones
                steps[name]()
            elif name not in failed:
                full = next(
                    (step for other, step in steps.items() if not WAYS[other].keys() & {"lora", "float32"}), None
                )
                steps[name] = new_step(base, WAYS[name], ids, full, pool, folder)
                seconds, graphs = round(time.perf_counter() - start, 1), counters["stats"]["unique_graphs"] - graphs
                ready[name] = {"ready_seconds": seconds, "compiled_graphs": graphs}
                print(f"  {name}: ready after {seconds} s, {graphs} graphs compiled", flush=True)
        except Exception as error:  # a way that this machine or version cannot go is a result too
            failed[name] = reason(error)
            steps.pop(name, None)
            pool = torch.cuda.graph_pool_handle() if CUDA else None  # that of a failed capture is not used again
            print(f"  {name} failed: {failed[name]}", flush=True)
        empty()
        tell({"ready": ready, "failed": failed})
    return steps, ready, failed


def timed(steps: dict[str, Step | UnslothStep], failed: dict[str, str], rounds: int) -> PairedTimes | None:
    """The steps' times in turns. One that runs out of memory goes to the failed ones, and the others begin anew."""
    now = ""

    def call(name: str) -> None:
        nonlocal now
        now = name
        steps[name]()

    while steps:
        try:
            return paired_times({name: partial(call, name) for name in steps}, rounds, warmup=2)
        except (torch.OutOfMemoryError, ChildProcessError) as error:
            failed[now] = reason(error)
            print(f"  {now} failed: {failed[now]}", flush=True)
        del steps[now]
        empty()
    return None


def compare(
    base: Any,
    names: list[str],
    batch: int,
    tokens: int,
    rounds: int,
    tell: Callable[[dict[str, Any]], None] = lambda so_far: None,
    folder: Path = Path(),
) -> dict[str, Any]:
    """One shape: every way's times in turns, its losses and its memory."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(base.config.vocab_size, (batch, tokens), generator=generator).to(DEVICE)
    line: dict[str, Any] = {"batch": batch, "tokens": tokens, "asked": names, "ceiling_tflops": [ceiling()]}
    chosen, line["skipped"] = that_fit(base, names, batch, tokens)
    for name, why in line["skipped"].items():
        print(f"  {name} left out: {why}", flush=True)
    steps, ready, line["failed"] = prepare(base, chosen, ids, lambda so_far: tell(line | so_far), folder)
    times = timed(steps, line["failed"], rounds)
    with suppress(RuntimeError):  # no random numbers, if a failed capture took them along
        line["ceiling_tflops"].append(ceiling())
    weights = sum(p.numel() for p in base.parameters()) - base.get_input_embeddings().weight.numel()
    best = max(line["ceiling_tflops"])
    line["device_used_bytes"] = used()
    line["ways"] = {}
    for step in steps.values():
        step.close()
    if times is None:  # none is left
        return line
    for name, step in steps.items():
        flops = (4 if "lora" in WAYS[name] else 6) * weights * batch * tokens
        line["ways"][name] = ready[name] | {
            "trainable": step.trainable,
            "steps_ms": [round(1e3 * seconds, 3) for seconds in times.seconds[name]],
            "share_of_ceiling": round(flops / median(times.seconds[name]) / 1e12 / best, 4),
            "against_full": round(times.ratio(name, "full"), 4) if "full" in steps else None,
            "peak_bytes": step.peak if CUDA else 0,
            "losses": [round(loss.item(), 4) for loss in step.losses[:6]],
        }
    return line


def read(out: Path) -> dict[str, Any]:
    """The record so far."""
    if out.exists():
        return json.loads(out.read_text(encoding="utf-8"))
    return {"what": __doc__.split("\n")[0], "seed": SEED, "r": R, "shapes": []}


def is_there(line: dict[str, Any], out: Path) -> bool:
    """Whether the record answers the line's question already, whole, by the same code on a machine of this kind."""
    here = line["machine"]
    for each in read(out)["shapes"]:
        asked = all(each.get(key) == line[key] for key in ("batch", "tokens", "asked", "rounds"))
        alike = all(each["machine"][key] == here[key] for key in ("commit", "hardware", "versions"))
        if asked and alike and not each["failed"]:
            return here["commit"] != "unknown"
    return False


def add(line: dict[str, Any], out: Path) -> None:
    """Write the line into the record, in place of one that answers the same question, in however many rounds."""
    record, same = read(out), ("batch", "tokens", "asked")
    record.pop("unfinished", None)
    record["shapes"] = [each for each in record["shapes"] if any(each[key] != line[key] for key in same)]
    record["shapes"].append(line)
    write_record(record, out)


def add_unfinished(line: dict[str, Any], out: Path) -> None:
    """Write how far a shape has come, beside the lines that are whole."""
    write_record(read(out) | {"unfinished": line}, out)


def shape(text: str) -> tuple[int, int]:
    """ "4x512" → (4, 512)."""
    batch, tokens = map(int, text.split("x"))
    return batch, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "runs" / "speed_7b.json")
    parser.add_argument("--shape", type=shape, nargs="+", help="batch x tokens, one or several, as 1x512 4x512 16x512")
    parser.add_argument(
        "--ways", default=None, help="only these, separated by ';' (default: all but autotuned, fp32 and unsloth ones)"
    )
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--toy", action="store_true", help="a tiny model, to try the script")
    arguments = parser.parse_args()
    if not CUDA and not arguments.toy:
        print("speed_7b needs a GPU and found none: nothing was measured (--toy tries the script)")
        return
    asked = (
        arguments.ways.split(";")
        if arguments.ways
        else [name for name, way in WAYS.items() if not way.keys() & {"mode", "extra"}]
    )
    if unknown := set(asked) - WAYS.keys():
        parser.error(f"--ways: no way {min(unknown)!r}; there are: {'; '.join(WAYS)}")
    torch._dynamo.config.recompile_limit = 64  # every way has compiled blocks of its own
    base = new_base(LlamaConfig(**(TOY if arguments.toy else {}), attn_implementation=causal_attention()))
    folder = TemporaryDirectory()
    for batch, tokens in arguments.shape or [(2, 16) if arguments.toy else (4, 512)]:
        names = asked
        if batch * tokens > ALL_UP_TO and not arguments.ways:
            names = [name for name in asked if not WAYS[name].get("large")]
        machine = surroundings("bfloat16")
        machine["versions"]["peft"] = peft.__version__ if peft else None
        if any(WAYS[name].get("lora") == "unsloth" for name in names):
            machine["versions"]["unsloth"] = installed()
        question = {"batch": batch, "tokens": tokens, "asked": names, "rounds": arguments.rounds, "machine": machine}
        if is_there(question, arguments.out):
            print(f"{batch}×{tokens} is there already, by this commit", flush=True)
            continue
        print(f"{batch}×{tokens}", flush=True)
        start = time.perf_counter()
        about = {"command": " ".join(["python", "benchmarks/speed_7b.py", *sys.argv[1:]])}
        about |= {"rounds": arguments.rounds, "machine": machine}
        tell = lambda line, about=about: add_unfinished(line | about, arguments.out)  # noqa: E731
        line = compare(base, names, batch, tokens, arguments.rounds, tell, Path(folder.name)) | about
        line["seconds"] = round(time.perf_counter() - start, 1)
        add(line, arguments.out)
        for name, way in line["ways"].items():
            against = "" if way["against_full"] is None else f"{way['against_full']:.3f} of full"
            print(
                f"{batch}×{tokens}  {name:28} {median(way['steps_ms']):8.2f} ms  {against:14} "
                f"{way['share_of_ceiling']:.3f} of the ceiling  {way['peak_bytes'] / 2**30:.2f} GiB",
                flush=True,
            )
        torch.compiler.reset()
        empty()
    folder.cleanup()


if __name__ == "__main__":
    main()
