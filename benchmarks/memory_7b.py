"""Peak memory and time of one training step of a 7B-shaped Llama, for lesson 06. Needs a GPU of 80 GB or more.

    python benchmarks/memory_7b.py                     # data/runs/memory_7b.json, in pieces of nine minutes at most
    python benchmarks/memory_7b.py --shapes 13b 70b    # larger shapes, as far as they fit
    python benchmarks/memory_7b.py --toy --out x.json  # the same code on tiny shapes, on any machine

The weights are random: neither bytes nor times depend on their values. Each method gets a fresh model, each line of the
table fresh adapters, gradients and optimizer. The record keeps every timed step, the memory after each phase of one
step, and the peak inside each phase.

The file is written anew after every line, whole or not at all. Stopped or killed, the same command keeps the lines that
are there and measures the others. Lines are compared with each other, so a file holds those of one GPU, one version of
PyTorch and one number of steps: in a file of others nothing is changed. The seven methods at 7B are its ``runs``, which
lessons read; quantised ones and larger shapes are its ``further_runs``. A line that cannot fit by the prediction of
lora_edu.counting.memory is recorded as out of memory without being tried.

QLoRA is measured where bitsandbytes and PEFT are installed, with PEFT's adapters. benchmarks/nf4_speed.py puts the four
bits and the adapters of lora_edu beside them.
"""

import argparse
import gc
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_edu import LoraConfig, count_parameters, inject
from lora_edu.core.adapter import AdapterLayer
from lora_edu.counting.memory import training_memory
from lora_edu.counting.meta import load_config, meta_model
from lora_edu.files import locked
from lora_edu.lab.recording.records import provenance, resumed, write_record

warnings.filterwarnings("ignore", message="`gradient_checkpointing_")
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

SEED = 0
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
QV = ["q_proj", "v_proj"]
OUT = Path(__file__).parents[1] / "data" / "runs" / "memory_7b.json"
METHODS: dict[str, dict[str, Any]] = {  # recipe: what lora_edu.counting.memory calls it
    "full, all bf16": {"recipe": ("full", "bf16"), "moments": "bfloat16"},
    "lora q,v r=8": {"recipe": ("lora", "bf16"), "targets": QV, "r": 8},
    "lora all-linear r=16": {"recipe": ("lora", "bf16"), "targets": "all-linear", "r": 16},
    "lora all-linear r=64": {"recipe": ("lora", "bf16"), "targets": "all-linear", "r": 64},
    "full, fp32 moments": {"recipe": ("full", "fp32-moments"), "moments": "float32"},
    "lora all-linear r=16, fp32 adapter": {
        "recipe": ("lora", "fp32-adapter"), "targets": "all-linear", "r": 16, "adapter": "float32",
    },
    "full, fp32 moments and master": {"recipe": ("full", "mixed"), "moments": "float32", "master": True},
    "qlora r=16 (bitsandbytes)": {
        "recipe": ("qlora", "nf4-dq"), "targets": "all-linear", "r": 16, "adapter": "float32", "quantised": True,
    },
}  # fmt: skip
CONFIG = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"]
SHAPES = {"7b": "llama-7b", "13b": "llama-13b", "70b": "llama-2-70b"}  # configs in data/configs
BATCHES = [(1, 512), (4, 512), (16, 512)]
TOY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
TOY_SHAPES: dict[str, dict[str, int]] = {
    "7b": {},
    "13b": {"num_hidden_layers": 3},
    "70b": {"hidden_size": 128, "num_key_value_heads": 2},
}
TOY_BATCHES = [(1, 16), (2, 16)]
HOPELESS = 1.05  # of the GPU's memory, by the prediction, which is right to 3 %
Line = dict[str, Any]


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


class TrainingStep:
    """One way's model and optimizer, which a subclass makes; a call takes one training step and keeps its loss."""

    model: Any
    optimizer: torch.optim.Optimizer
    autocast = False  # to bfloat16

    def __init__(self, ids: Tensor):
        self.ids = ids
        self.losses: list[Tensor] = []
        self.run: Callable[[], Tensor] = self.eager

    def eager(self) -> Tensor:
        """Forward, backward, optimizer."""
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.autocast):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def __call__(self) -> None:
        loss = self.run()
        synchronize()
        self.losses.append(loss.clone())


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


def capacity() -> float:
    """Bytes of memory of the GPU; without one there is no limit to run into."""
    return torch.cuda.get_device_properties(0).total_memory if CUDA else math.inf


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


def bitsandbytes_layer(layer: nn.Linear) -> nn.Module:
    """The layer in NF4 with double quantisation, by bitsandbytes."""
    import bitsandbytes

    nf4 = {"compress_statistics": True, "quant_type": "nf4"}
    sizes = (layer.in_features, layer.out_features)
    packed = bitsandbytes.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, device="meta", **nf4)
    packed.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, **nf4)
    return packed.to(DEVICE)  # quantised on its way


def new_quantised_model(
    config: LlamaConfig, packed: Callable[[nn.Linear], nn.Module] = bitsandbytes_layer
) -> LlamaForCausalLM:
    """The same with the linear layers, all but the head, in four bits.

    One weight at a time is drawn and quantised: 70B in bfloat16 would leave no room to quantise it in.
    """
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(config)
        with DEVICE:
            model.model.rotary_emb = type(model.model.rotary_emb)(config)  # holds numbers, not weights
    finally:
        torch.set_default_dtype(torch.float32)
    for name in [name for name, _ in model.named_modules()]:  # names: a list of layers would keep what is replaced
        layer = model.get_submodule(name)
        for key, p in list(layer.named_parameters(recurse=False)):
            weight = torch.ones(p.shape, dtype=torch.bfloat16, device=DEVICE)
            if p.ndim == 2:
                weight.normal_(std=config.initializer_range)
            setattr(layer, key, nn.Parameter(weight, requires_grad=False))
        if isinstance(layer, nn.Linear) and name != "lm_head":
            model.set_submodule(name, packed(layer))
    model.is_loaded_in_4bit = True  # what PEFT asks before it adapts such layers
    return model.train()


def clean(model: nn.Module) -> None:
    """Take the adapters off, drop the gradients, freeze everything, and free what nothing refers to any more."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, AdapterLayer):
            model.set_submodule(name, layer.frozen)
        elif hasattr(layer, "base_layer"):  # PEFT's
            model.set_submodule(name, layer.base_layer)
    for name in ("adapter_state", "peft_config"):  # what inject and PEFT noted on the model
        model.__dict__.pop(name, None)
    model.requires_grad_(False)
    for p in model.parameters():
        p.grad = None
    empty()


def prepare(model: nn.Module, method: dict[str, Any]) -> torch.optim.Optimizer:
    """Make trainable what the method trains, with fresh adapters, and return a fresh optimizer for it."""
    if "targets" in method:
        torch.manual_seed(SEED)
        lora = {"r": method["r"], "lora_alpha": method["r"], "target_modules": method["targets"]}
        wide = method.get("adapter") == "float32"
        if method.get("quantised"):
            import peft

            peft.get_peft_model(model, peft.LoraConfig(**lora), autocast_adapter_dtype=wide)  # in place
        else:
            inject(model, LoraConfig(**lora), autocast_adapter_dtype=wide)
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


def predicted(meta: nn.Module, line: Line) -> int:
    """Bytes at the peak of this line's step, as lora_edu.counting.memory computes them from the config."""
    method = METHODS[line["method"]]
    lora = {"r": method["r"], "target_modules": method["targets"]} if "targets" in method else {}
    names = ("batch", "tokens", "checkpointing")
    return round(training_memory(meta, *method["recipe"], **lora, **{name: line[name] for name in names}).peak)


def wanted(shapes: list[str], batches: list[tuple[int, int]]) -> list[Line]:
    """All lines of the table, without results. Those beside the first table say which shape they are of."""
    lines = []
    for shape in shapes:
        for name, method in METHODS.items():
            further = {"shape": shape} if shape != "7b" or method.get("quantised") else {}
            for batch, tokens in batches:
                for checkpointing in (False, True):
                    what = {"method": name, "batch": batch, "tokens": tokens, "checkpointing": checkpointing}
                    lines.append(further | what)
    return lines


def key(line: Line) -> tuple[Any, ...]:
    """What tells a line from the others."""
    return tuple(line.get(name) for name in ("shape", "method", "batch", "tokens", "checkpointing"))


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was called, when, and where."""
    device = torch.cuda.get_device_properties(0) if CUDA else None
    hardware = f"{device.name}, {device.total_memory / 2**30:.0f} GiB" if device else platform.machine()
    return provenance("benchmarks/memory_7b.py", hardware, arguments.commit, "bitsandbytes", "peft")


def fill(record: dict[str, Any], todo: list[Line], configs: dict[str, LlamaConfig], arguments: Any) -> bool:
    """Measure these lines, and write the record after each; True if none is left when the time is up."""
    start, seconds = time.perf_counter(), 60 * arguments.minutes
    session = record  # what says when and where the lines were measured
    if record["runs"] or "further_runs" in record:
        session = about(arguments) | {"ceiling_tflops": []}
        record.setdefault("continued", []).append(session)
    session["ceiling_tflops"].append(ceiling())
    model, meta, built = None, nn.Module(), ("", "")
    weights, measured = 0, 0
    for line in todo:
        if measured and time.perf_counter() - start > seconds:  # never before the first, however slowly it starts
            break
        shape, name = line.get("shape", "7b"), line["method"]
        method, config = METHODS[name], configs[shape]
        if (shape, name) != built:
            model = None
            empty()
            if shape != built[0]:
                meta = meta_model(config)
            built = (shape, name)
        if session is not record:
            line["continued"] = len(record["continued"]) - 1
        if method.get("quantised"):
            line["adapters"] = "PEFT's"
        line["predicted_bytes"] = predicted(meta, line)
        if line["predicted_bytes"] > HOPELESS * capacity():
            line |= {"out_of_memory": True, "tried": False}
        else:
            try:
                if model is None:
                    model = (new_quantised_model if method.get("quantised") else new_model)(config)
                    weights = allocated()
                ran = (line["batch"], line["tokens"], line["checkpointing"], arguments.steps, arguments.warmup)
                line |= measure(model, method, *ran)
            except torch.OutOfMemoryError:
                line["out_of_memory"] = True
            if model is None:
                empty()
            else:
                clean(model)
                line["left_over_bytes"] = allocated() - weights
        if shape != "7b":
            numbers = {each: getattr(config, each) for each in [*CONFIG, "num_key_value_heads"]}
            record.setdefault("shapes", {})[shape] = numbers | {"parameters": count_parameters(meta)[1]}
        record.setdefault("further_runs", []).append(line) if "shape" in line else record["runs"].append(line)
        measured += 1
        session["seconds"] = round(time.perf_counter() - start, 1)
        write_record(record, arguments.out)
        memory = line.get("peak_bytes", line["predicted_bytes"]) / 2**30
        print(
            f"{session['seconds']:6.1f} s  {shape:3} {name:36} {line['batch']:2}×{line['tokens']} "
            f"{'ckpt' if line['checkpointing'] else '    '}  {line.get('step_ms', 'out of memory')} ms  "
            f"{memory:.2f} GiB{' predicted' if 'peak_bytes' not in line else ''}  "
            f"left {line.get('left_over_bytes', 0)}",
            flush=True,
        )
    del model
    empty()
    session["ceiling_tflops"].append(ceiling())
    write_record(record, arguments.out)
    return measured == len(todo)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["7b"], help="which models (default: 7b)")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=9, help="start no further line after so many minutes")
    parser.add_argument("--seconds", type=float, help="the same in seconds")
    parser.add_argument("--commit", default=None, help="what to record as the commit, where git cannot tell")
    arguments = parser.parse_args()
    if arguments.seconds is not None:
        arguments.minutes = arguments.seconds / 60
    if not arguments.minutes >= 0:
        parser.error(f"--minutes {arguments.minutes}: expected a time of 0 or more; one line is always measured")
    if not CUDA and not arguments.toy:
        print("memory_7b needs a GPU of 80 GB or more and found none: nothing was measured (--toy tries the script)")
        return
    shapes = [shape for shape in SHAPES if shape in arguments.shapes]
    configs: dict[str, Any] = {shape: load_config(SHAPES[shape]) for shape in SHAPES}
    if arguments.toy:
        configs = {shape: LlamaConfig(**TOY | more) for shape, more in TOY_SHAPES.items()}
    new = {
        "what": "one training step: peak memory and time; random weights in bf16, SDPA attention, no dropout",
        **about(arguments),
        "seed": SEED,
        "config": {name: getattr(configs["7b"], name) for name in CONFIG},
        "steps": arguments.steps,
        "warmup": arguments.warmup,
        "ceiling_tflops": [],
        "runs": [],
        "parameters": count_parameters(meta_model(configs["7b"]))[1],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with locked(arguments.out):
        try:
            record = resumed(arguments.out, new, ("hardware", "seed", "config", "steps", "warmup"), key)
        except ValueError as error:
            if arguments.out != OUT:
                parser.error(str(error))
            print(f"nothing was measured: {error}")  # the shipped record, on another machine
            return
        done = {key(line) for line in [*record["runs"], *record.get("further_runs", [])]}
        todo = [line for line in wanted(shapes, TOY_BATCHES if arguments.toy else BATCHES) if key(line) not in done]
        if not (find_spec("bitsandbytes") and find_spec("peft")):
            print("without bitsandbytes and PEFT there is no QLoRA: its lines are left out")
            todo = [line for line in todo if not METHODS[line["method"]].get("quantised")]
        complete = fill(record, todo, configs, arguments) if todo else True
    print("complete" if complete else "stopped at the time limit; the same command goes on")


if __name__ == "__main__":
    main()
