"""Time and memory of a training step: our plain and fused LoRA, or DoRA, PEFT's, and full fine-tuning, on the CPU.

    python benchmarks/peft_speed.py                      # writes data/runs/peft_speed.json, 25 minutes on 2 cores
    python benchmarks/peft_speed.py --quick              # the same code on small shapes, in half a minute
    python benchmarks/peft_speed.py --dora               # the same of DoRA: writes data/runs/dora_speed.json

"ours" is the plain layer of lesson 03, "fast" the fused one of lesson 24; of DoRA, those of lesson 17, and "lora" is
our plain LoRA beside them. Two shapes. "bert": hidden 384, 6 layers, as
in minilm, random weights, one thread, processor time. "smollm2": the SmolLM2-135M model, two threads, wall time. All
methods of a comparison stand in one process and take a step in turns, so that a disturbance meets all of them; what
counts are the ratios of each round. Memory is measured in other processes, one for each method. The record keeps every
timed step. Targets are printed beside the ratios; nothing fails.
"""

import gc
import json
import os
import platform
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when PyTorch is imported: waiting threads sleep

import peft
import torch
import transformers
import typer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

import lora_edu
from lora_edu import load_base
from lora_edu.core.adapter import adapter_layers
from lora_edu.counting.measure import paired_times, peak_memory
from lora_edu.counting.meta import load_config
from lora_edu.lab.bases import list_bases
from lora_edu.lab.recording.records import commit, processor, write_record

warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

ROOT = Path(__file__).resolve().parents[1]
SEED = 0
MATTERS = ("OMP_", "GOMP_", "MKL_", "MALLOC_", "ATEN_")  # variables that change times start like this
BERT = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
BERT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # LoRA's own is what we compare
SMALL = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
QV, LINEAR = ["query", "value"], ["query", "key", "value", "dense"]
COMPARISONS: list[dict[str, Any]] = [
    {"shape": "bert", "adapted": "q,v", "lora_dropout": 0.0},
    {"shape": "bert", "adapted": "all-linear", "lora_dropout": 0.0},
    {"shape": "bert", "adapted": "q,v", "lora_dropout": 0.1},
    {"shape": "bert", "adapted": "all-linear", "lora_dropout": 0.1},
    {"shape": "smollm2", "adapted": "all-linear", "lora_dropout": 0.0},
]
DORA = [{"shape": "bert", "adapted": "all-linear", "lora_dropout": 0.0, "use_dora": True}]
RATIOS = [
    *[("ours", "peft"), ("ours", "full"), ("peft", "full"), ("fast", "peft"), ("fast", "full"), ("fast", "ours")],
    *[("ours", "lora"), ("peft", "lora"), ("fast", "lora")],
]


def targets(comparison: dict[str, Any]) -> dict[str, float]:
    """The ratios that the course sets itself, at most."""
    if comparison.get("use_dora"):
        return {"ours / peft": 0.80, "fast / peft": 0.70}
    if comparison["shape"] == "smollm2":
        return {"ours / peft": 1.03, "ours / full": 0.88, "fast / full": 0.75}
    fast = {("q,v", 0.0): 0.94, ("all-linear", 0.0): 0.85, ("all-linear", 0.1): 0.83}
    found = fast.get((comparison["adapted"], comparison["lora_dropout"]))
    return {"ours / peft": 1.03} | ({"fast / peft": found} if found else {})


SHAPES: dict[str, dict[str, Any]] = {
    "bert": {"batch": 16, "tokens": 128, "threads": 1, "clock": "process_time", "r": 8, "lora_alpha": 16},
    "smollm2": {"batch": 8, "tokens": 92, "threads": 2, "clock": "perf_counter", "r": 8, "lora_alpha": 16},
}
QUICK = {"batch": 2, "tokens": 16}


def smollm2_is_here() -> bool:
    """Whether the fetched base is on this machine; without it the same shape gets random weights."""
    return any(base.name == "smollm2-135m" and base.present for base in list_bases())


def new_model(shape: str, quick: bool) -> nn.Module:
    """A model in training mode; the same weights at every call."""
    torch.manual_seed(SEED)
    if shape == "bert":
        config = BertConfig(**(SMALL | {"vocab_size": 512} if quick else BERT), **BERT_DROPOUT)
        return BertForSequenceClassification(config).train()
    if not quick and smollm2_is_here():
        return load_base("smollm2-135m")[0].train()
    config = load_config("smollm2-135m")
    if quick:
        config.update(SMALL | {"num_key_value_heads": 3, "head_dim": 16, "vocab_size": 512})
    return AutoModelForCausalLM.from_config(config).train()


class Step:
    """One method's model, batch and optimizer. A call takes one training step and notes its loss and its phases."""

    def __init__(self, comparison: dict[str, Any], method: str, quick: bool = False):
        shape = comparison["shape"]
        settings = SHAPES[shape] | (QUICK if quick else {})
        self.clock: Callable[[], float] = getattr(time, settings["clock"])
        self.model: Any = new_model(shape, quick)
        size = (settings["batch"], settings["tokens"])
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(self.model.config.vocab_size, size, generator=generator)
        labels = torch.arange(size[0]) % 2 if shape == "bert" else ids
        self.batch = {"input_ids": ids, "labels": labels}
        if method != "full":
            names: Any = {"q,v": QV, "all-linear": LINEAR} if shape == "bert" else {"all-linear": "all-linear"}
            lora = {
                "r": settings["r"],
                "lora_alpha": settings["lora_alpha"],
                "lora_dropout": comparison["lora_dropout"],
                "target_modules": names[comparison["adapted"]],
                "modules_to_save": ["classifier"] if shape == "bert" else None,
                "use_dora": comparison.get("use_dora", False) and method != "lora",
            }
            if method == "peft":
                self.model = peft.get_peft_model(self.model, peft.LoraConfig(**lora))
            else:
                lora_edu.inject(self.model, lora_edu.LoraConfig(**lora), fast=method == "fast")
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trainable = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.losses: list[float] = []
        self.phases: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}

    def __call__(self) -> None:
        times = [self.clock()]
        loss: Tensor = self.model(**self.batch).loss
        times.append(self.clock())
        loss.backward()
        times.append(self.clock())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(self.clock())
        for index, taken in enumerate(self.phases.values()):
            taken.append(round(times[index + 1] - times[index], 5))
        self.losses.append(round(loss.item(), 6))


def start_alike(ours: nn.Module, theirs: nn.Module) -> int:
    """Give our adapter PEFT's initial A, and return how many layers both adapt.

    Raises:
        ValueError: if the two adapt different layers.
    """
    layers: dict[str, Any] = dict(adapter_layers(ours))
    suffix, prefix = ".lora_A.default.weight", "base_model.model."
    found = {
        name.removeprefix(prefix).removesuffix(suffix): value
        for name, value in theirs.named_parameters()
        if name.endswith(suffix)
    }
    if set(found) != set(layers):
        raise ValueError(f"PEFT and we adapt different layers: {sorted(set(found) ^ set(layers))[:4]}")
    with torch.no_grad():
        for name, value in found.items():
            layers[name].lora_A.copy_(value)
    return len(layers)


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations inside the block, and the numbers that they produce: the same on every machine."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls[str(function)] += 1
        self.numbers += result.numel() if isinstance(result, Tensor) else 0
        return result


def operations(step: Step) -> dict[str, int]:
    """How many operations one more step takes, forward, backward and optimizer, and how many numbers they produce."""
    with Operations() as counted:
        step()
    return {"calls": counted.calls.total(), "numbers": counted.numbers}


def interval_of_median(values: list[float], samples: int = 2000) -> list[float]:
    """The 95 % bootstrap interval of a median, with a fixed seed."""
    draw = random.Random(SEED)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(samples))
    return [round(medians[int(share * samples)], 4) for share in (0.025, 0.975)]


def counted(step: Step, bar: tqdm) -> Callable[[], None]:
    """The step, and one more on the bar."""

    def call() -> None:
        step()
        bar.update()

    return call


def compare(comparison: dict[str, Any], methods: list[str], rounds: int, warmup: int, quick: bool, bar: tqdm) -> Any:
    """Time one comparison's methods in turns; the line of the record without its memory."""
    settings = SHAPES[comparison["shape"]] | (QUICK if quick else {})
    torch.set_num_threads(settings["threads"])
    steps = {method: Step(comparison, method, quick) for method in methods}
    layers = [start_alike(steps[name].model, steps["peft"].model) for name in methods if name not in ("full", "peft")]
    functions = {method: counted(step, bar) for method, step in steps.items()}
    times = paired_times(functions, rounds, warmup, getattr(time, settings["clock"]))
    ratios = {}
    for name, against in RATIOS:
        if name in methods and against in methods:
            found = times.ratios(name, against)
            ratios[f"{name} / {against}"] = {
                "median": round(median(found), 4),
                "middle_half": [round(value, 4) for value in times.middle_half(name, against)],
                "interval_95": interval_of_median(found),
            }
    line = comparison | settings
    line |= {
        "layers": layers[0],
        "trainable": {method: step.trainable for method, step in steps.items()},
        "targets": {} if quick else targets(comparison),  # meant for the real shapes
        "ratios": ratios,
        "seconds": {method: [round(value, 5) for value in taken] for method, taken in times.seconds.items()},
        "phases": {method: {phase: [*taken] for phase, taken in step.phases.items()} for method, step in steps.items()},
        "losses": {method: list(step.losses) for method, step in steps.items()},
        "operations": {method: operations(step) for method, step in steps.items()},
    }
    if comparison["shape"] == "smollm2":
        line["weights"] = "pretrained" if not quick and smollm2_is_here() else "random"
    del steps, functions
    gc.collect()
    return line


def memory(chosen: list[dict[str, Any]], methods: list[list[str]], quick: bool) -> list[dict[str, dict[str, int]]]:
    """For each comparison, bytes of each method's process before and at the peak of two steps, on one thread."""
    preload = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport accelerate, peft_speed\n"
    codes = {
        f"{index} {method}": (
            f"import peft_speed\nstep = peft_speed.Step({comparison!r}, {method!r}, {quick!r})",
            "step()\nstep()",
        )
        for index, comparison in enumerate(chosen)
        for method in methods[index]
    }
    found = peak_memory(codes, preload, timeout=900)
    sizes = {name: {"before": size.before, "peak": size.peak} for name, size in found.items()}
    return [{method: sizes[f"{index} {method}"] for method in names} for index, names in enumerate(methods)]


def table(record: dict[str, Any]) -> Iterator[str]:
    """The ratios against their targets, and the memory, line by line."""
    yield f"{'shape':8} {'adapted':11} {'dropout':>7}  {'ratio':12} {'median':>6}  {'95 %':13}  target"
    for line in record["comparisons"]:
        for name, ratio in line["ratios"].items():
            low, high = ratio["interval_95"]
            limit = line["targets"].get(name)
            target = "" if limit is None else f"≤ {limit:.2f}  {'met' if ratio['median'] <= limit else 'not met'}"
            head = f"{line['shape']:8} {line['adapted']:11} {line['lora_dropout']:7.1f}"
            yield f"{head}  {name:12} {ratio['median']:6.3f}  {low:.3f}–{high:.3f}  {target}".rstrip()
    yield "memory that a step takes on top of model and data in MiB, and the operations of a step"
    for line in record["comparisons"]:
        sizes = {m: (size["peak"] - size["before"]) / 2**20 for m, size in line["peak_memory"].items()}
        words = "  ".join(f"{m} {size:.0f} ({line['operations'][m]['calls']})" for m, size in sizes.items())
        yield f"{line['shape']:8} {line['adapted']:11} {line['lora_dropout']:7.1f}  {words}"


def lines_to_keep(path: Path, record: dict[str, Any], only: str | None) -> list[dict[str, Any]]:
    """With ``--only``, the file's lines of other shapes, if they were measured under the same terms."""
    if only is None or not path.exists():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    terms = ("hardware", "versions", "seed", "environment", "rounds", "warmup")
    if any(before[name] != record[name] for name in terms):
        raise typer.BadParameter(f"{path} was made with other versions or settings: run without --only")
    others = [line for line in before["comparisons"] if line["shape"] != only]
    if others:
        record["other_shapes"] = {name: before[name] for name in ("command", "date", "commit", "load_average")}
    return others


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes and 3 rounds: tries the script.")] = False,
    rounds: Annotated[int | None, typer.Option(help="Timed rounds of each comparison; 24, or 3 with --quick.")] = None,
    warmup: Annotated[int, typer.Option(help="Rounds before that are not timed.")] = 2,
    out: Annotated[Path | None, typer.Option(help="The file to write, by default data/runs/peft_speed.json.")] = None,
    only: Annotated[str | None, typer.Option(help="One shape: bert or smollm2.")] = None,
    dora: Annotated[bool, typer.Option("--dora", help="DoRA instead of LoRA, on the shape bert.")] = False,
    revision: Annotated[str | None, typer.Option("--commit", help="The commit, where git cannot tell.")] = None,
) -> None:
    """Time our plain and fused training steps of LoRA, or DoRA, against PEFT's and others, and measure their memory."""
    if only not in (None, *SHAPES):
        raise typer.BadParameter(f"--only {only}: expected {' or '.join(SHAPES)}")
    if dora and only == "smollm2":
        raise typer.BadParameter("--only smollm2: DoRA is timed on the shape bert, so leave it out with --dora")
    rounds = rounds or (3 if quick else 24)
    name = "dora_speed" if dora else "peft_speed"
    path = out or ROOT / (f"build/{name}_quick.json" if quick else f"data/runs/{name}.json")
    start = time.perf_counter()
    record: dict[str, Any] = {
        "what": f"one training step in float32 with AdamW: ours (plain, fast), PEFT's, {'LoRA' if dora else 'full'}; "
        "ratios of paired steps",
        "command": " ".join(["python", "benchmarks/peft_speed.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": revision or commit(),
        "hardware": processor(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "seed": SEED,
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(MATTERS)},
        "environment_of_memory": {"MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"},  # set by peak_memory
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,  # at the start, of 1, 5, 15 minutes
        "rounds": rounds,
        "warmup": warmup,
    }
    chosen = [comparison for comparison in (DORA if dora else COMPARISONS) if only in (None, comparison["shape"])]
    kept = lines_to_keep(path, record, only)
    # Full fine-tuning has no LoRA dropout: once for each choice of layers is enough.
    beside = [["lora"] if dora else ["full"] * (not comparison["lora_dropout"]) for comparison in chosen]
    methods = [[*others, "ours", "peft", "fast"] for others in beside]
    total = (rounds + warmup) * sum(map(len, methods))
    measured: list[dict[str, Any]] = []
    with tqdm(total=total, unit="step", disable=os.environ.get("LORA_EDU_PROGRESS") == "0") as bar:
        for comparison, names in zip(chosen, methods, strict=True):
            bar.set_description(f"{comparison['shape']} {comparison['adapted']}")
            measured.append(compare(comparison, names, rounds, warmup, quick, bar))
        bar.set_description("memory")
        for line, sizes in zip(measured, memory(chosen, methods, quick), strict=True):
            line["peak_memory"] = sizes
    record["seconds"] = round(time.perf_counter() - start, 1)
    record["comparisons"] = sorted(measured + kept, key=lambda line: list(SHAPES).index(line["shape"]))
    write_record(record, path)
    print("\n".join(table(record)))
    print(f"wrote {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


if __name__ == "__main__":
    typer.run(main)
