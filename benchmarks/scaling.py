"""How LoRA training scales from one GPU to several, whole models (DDP) and shards of them (FSDP). For lesson 25.

    python benchmarks/scaling.py --gpus 2               # writes data/runs/scaling.json
    python benchmarks/scaling.py --toy --out x.json     # the same code on a tiny shape, two processes on any machine

Every GPU gets the same batch, so that N of them do N times the work of one (weak scaling). Each line is a launch of its
own, with the configurations in data/accelerate/; the first one is a single process that knows of no other. The weights
are random: neither bytes nor times depend on their values. The file is written anew after every launch, whole or not
at all, and keeps every timed step of every GPU. Stopped, killed, or after a launch that failed, the same command keeps
the launches that are there and makes the others.

Bytes are those that each GPU sends in one step, worked out from the sizes, with the ring algorithms: an all-reduce of n
bytes over N GPUs sends 2(N - 1)/N · n from each, an all-gather or a reduce-scatter (N - 1)/N · n. What the collectives
were really called with in one step is counted beside it, and how fast one all-gather is by itself.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_edu import LoraConfig, inject
from lora_edu.files import locked
from lora_edu.lab.collectives import Collectives
from lora_edu.lab.distributed import new_accelerator, process_state, shard_on_the_cpu
from lora_edu.lab.recording.records import provenance, resumed, write_record
from lora_edu.quick import full_size

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "data" / "runs" / "scaling.json"
SEED = 0
RANK = 16
CUDA = torch.cuda.is_available()
SHAPES: dict[str, dict[str, int]] = {
    "1B": {  # TinyLlama's
        "num_hidden_layers": 22, "hidden_size": 2048, "intermediate_size": 5632,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
    },
    "7B": {  # Llama 2's
        "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    },
    "toy": {
        "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    },
}  # fmt: skip
BATCHES = [(1, 512), (4, 512), (16, 512)]  # rows and tokens, for each GPU
TOY_BATCHES = [(1, 16), (2, 16)]


def new_model(shape: str, device: torch.device) -> nn.Module:
    """A frozen model with random weights in bfloat16, and adapters on all its linear layers."""
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))
    finally:
        torch.set_default_dtype(torch.float32)
    model.train().requires_grad_(False)
    inject(model, LoraConfig(r=RANK, target_modules="all-linear"), autocast_adapter_dtype=False)
    return model


def size(parameters: Any) -> int:
    """Bytes of parameters."""
    return sum(p.numel() * p.element_size() for p in parameters)


def sent(model: Any, way: str, gpus: int) -> dict[str, int]:
    """Bytes that each GPU sends in one step, by what for."""
    part = (gpus - 1) / gpus
    trained = size(p for p in model.parameters() if p.requires_grad)
    if way == "alone":
        return {}
    if way == "ddp":
        return {"all-reduce of the adapters' gradients": round(2 * part * trained)}
    # The last norm and the head are kept from the forward to the backward pass, which needs them at once.
    kept = size([*model.model.norm.parameters(), *model.lm_head.parameters()])
    released = size(model.parameters()) - kept
    return {
        "all-gather of the weights, forward": round(part * (released + kept)),
        "all-gather of the weights, backward": round(part * released),
        "reduce-scatter of the adapters' gradients": round(part * trained),
    }


def synchronize() -> None:
    """Wait until the device has done what it was asked to do."""
    if CUDA:
        torch.cuda.synchronize()


def key(line: dict[str, Any]) -> tuple[str, str, int]:
    """The launch that a line belongs to."""
    return line["shape"], line["way"], line["gpus"]


def link_speed(device: torch.device, gpus: int) -> int:
    """Bytes that each GPU sends in a second of an all-gather while nothing else runs: the best of ten."""
    own = torch.zeros(2**28 if CUDA else 2**16, dtype=torch.uint8, device=device)
    whole = own.new_empty(gpus * own.numel())
    seconds = []
    for _ in range(10):
        process_state().wait_for_everyone()
        start = time.perf_counter()
        torch.distributed.all_gather_into_tensor(whole, own)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return round((gpus - 1) * own.numel() / min(seconds))


def measure(model: Any, optimizer: Any, vocabulary: int, batch: int, tokens: int, arguments: Any) -> dict[str, Any]:
    """Times and peak memory of training steps at one batch, from every GPU."""
    here = process_state()
    generator = torch.Generator().manual_seed(SEED + here.process_index)
    ids = torch.randint(vocabulary, (batch, tokens), generator=generator).to(here.device)

    def one_step() -> Tensor:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss

    def finish() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(arguments.warmup):
        one_step()
        finish()
    synchronize()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    milliseconds = []
    for _ in range(arguments.steps):
        here.wait_for_everyone()
        start = time.perf_counter()
        loss = one_step()
        finish()
        synchronize()
        milliseconds.append(round(1e3 * (time.perf_counter() - start), 3))
    peak = torch.cuda.max_memory_allocated() if CUDA else 0
    with Collectives() as counted:
        one_step()
    finish()
    every = gather_object([{"steps_ms": milliseconds, "peak_bytes": peak, "loss": round(float(loss.detach()), 4)}])
    slowest = [max(times) for times in zip(*(each["steps_ms"] for each in every), strict=True)]
    step = statistics.median(slowest)
    return {
        "rows_per_gpu": batch,
        "tokens_per_row": tokens,
        "step_ms": round(step, 3),
        "tokens_per_second": round(len(every) * batch * tokens / step * 1e3, 1),
        "collectives": dict(counted.bytes),
        "gpus_measured": every,
    }


def worker(arguments: argparse.Namespace) -> None:
    """One process of one launch: build the model, and measure it at every batch."""
    if arguments.worker == "fsdp" and not CUDA:
        shard_on_the_cpu()
    accelerator = new_accelerator()
    if not CUDA:
        torch.set_num_threads(1)
    gpus = accelerator.num_processes
    link = {} if arguments.worker == "alone" else {"link_bytes_per_second": link_speed(accelerator.device, gpus)}
    model: Any = new_model(arguments.shape, accelerator.device)
    line = {
        "shape": arguments.shape,
        "way": arguments.worker,
        "gpus": gpus,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "sent_bytes": sent(model, arguments.worker, gpus),
        **link,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=CUDA)
    del trained
    model, optimizer = accelerator.prepare(model, optimizer)
    if CUDA:
        torch.cuda.empty_cache()
        line["weights_bytes"] = torch.cuda.memory_allocated()
    found = []
    for batch, tokens in TOY_BATCHES if arguments.toy else BATCHES:
        try:
            vocabulary = SHAPES[arguments.shape]["vocab_size"]
            found.append(line | measure(model, optimizer, vocabulary, batch, tokens, arguments))
        except torch.OutOfMemoryError:  # on every GPU alike: they all hold the same and do the same
            found.append(line | {"rows_per_gpu": batch, "tokens_per_row": tokens, "out_of_memory": True})
            break
    if accelerator.is_main_process:
        arguments.out.write_text(json.dumps(found), encoding="utf-8")
    process_state().wait_for_everyone()
    # Not the usual end: gloo's threads may hold on to the Collectives, and Python would wait for them for ever.
    sys.stdout.flush()
    os._exit(0)


def launched(way: str, gpus: int, shape: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of one launch."""
    start = [sys.executable]
    if way != "alone":
        config = ROOT / "data" / "accelerate" / f"{way}.yaml"
        start += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(gpus)]
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.json"
        command = [*start, str(Path(__file__).resolve()), "--worker", way, "--shape", shape, "--out", str(lines)]
        command += ["--steps", str(arguments.steps), "--warmup", str(arguments.warmup)]
        command += ["--toy"] if arguments.toy else []
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            output, _ = process.communicate(timeout=arguments.timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher then ends the processes that it started
            output, _ = process.communicate()
        if process.returncode or not lines.exists():
            raise RuntimeError(f"{way} on {gpus}, {shape}, failed, or took {arguments.timeout} s:\n{output[-4000:]}")
        return json.loads(lines.read_text(encoding="utf-8"))


def with_efficiency(runs: list[dict[str, Any]]) -> None:
    """Put beside each line its tokens a second over N times those of one GPU alone, at the same shape and batch."""
    keys = ("shape", "rows_per_gpu", "tokens_per_row")
    alone = {tuple(line[key] for key in keys): line for line in runs if line["way"] == "alone"}
    for line in runs:
        base = alone.get(tuple(line[key] for key in keys), {})
        if "tokens_per_second" in line and "tokens_per_second" in base:
            line["efficiency"] = round(line["tokens_per_second"] / (line["gpus"] * base["tokens_per_second"]), 4)


def begun(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record to be filled, new or from the file, and its part that says when and where we measure.

    Raises:
        ValueError: if the file holds something else, or was recorded elsewhere or otherwise.
    """
    hardware = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}" if CUDA else platform.machine()
    session = provenance("benchmarks/scaling.py", hardware, arguments.commit, "accelerate")
    session["versions"]["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if CUDA else None
    new: dict[str, Any] = {
        "what": "LoRA training steps on several GPUs, each with the same batch; random weights in bf16, no dropout",
        **session,
        "seed": SEED,
        "rank": RANK,
        "shapes": {shape: SHAPES[shape] for shape in (["toy"] if arguments.toy else ["1B", "7B"])},
        "steps": arguments.steps,
        "warmup": arguments.warmup,
        "runs": [],
    }
    record = resumed(arguments.out, new, ("hardware", "seed", "rank", "shapes", "steps", "warmup"), key)
    if not record["runs"]:
        return record, record
    record.setdefault("continued", []).append(session)
    return record, session


def fill(record: dict[str, Any], session: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Make the launches that are not in the record, and write it after each.

    Raises:
        SystemExit: with code 1, at the end, if launches failed.
    """
    start = time.perf_counter()
    shapes = ["toy"] if arguments.toy else arguments.shapes
    launches = [(shape, "alone", 1) for shape in shapes]
    launches += [(shape, way, gpus) for gpus in arguments.gpus for shape in shapes for way in ("ddp", "fsdp")]
    done = set(map(key, record["runs"]))
    failed = []
    for shape, way, gpus in [launch for launch in launches if launch not in done]:
        if record["runs"] and time.perf_counter() - start > arguments.seconds:  # never before the first
            print(f"no time left for {shape}, {way} on {gpus}; the same command goes on")
            continue
        try:
            lines = launched(way, gpus, shape, arguments)
        except RuntimeError as error:
            print(error, flush=True)
            failed.append(f"{shape}, {way} on {gpus}")
            continue
        if session is not record:
            for line in lines:
                line["continued"] = len(record["continued"]) - 1
        record["runs"] += lines
        with_efficiency(record["runs"])
        session["seconds"] = round(time.perf_counter() - start, 1)
        write_record(record, arguments.out)
        for line in lines:
            peak = max((each["peak_bytes"] for each in line.get("gpus_measured", [])), default=0)
            print(
                f"{session['seconds']:6.1f} s  {shape:4} {way:5} on {gpus}  {line['rows_per_gpu']:2}×"
                f"{line['tokens_per_row']}  {line.get('step_ms', 'out of memory')} ms  "
                f"efficiency {line.get('efficiency', 0):.3f}  {peak / 2**30:.2f} GiB  "
                f"{sum(line['sent_bytes'].values()) / 2**20:.1f} MiB sent",
                flush=True,
            )
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}. Their own words stand above; the same command tries them again")


@full_size()  # on the GPUs, also where one process works by itself
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--gpus", type=int, nargs="+", default=[2], help="how many together; one alone is always there")
    parser.add_argument("--shapes", nargs="+", choices=["1B", "7B"], default=["1B", "7B"])
    parser.add_argument("--toy", action="store_true", help="a tiny shape on two processes, to try the script")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=260, help="start no further launch after so many seconds")
    parser.add_argument("--timeout", type=float, default=280, help="seconds after which a launch is given up")
    parser.add_argument("--commit", default=None, help="what to record as the commit, where git cannot tell")
    parser.add_argument("--worker", choices=["alone", "ddp", "fsdp"], help=argparse.SUPPRESS)
    parser.add_argument("--shape", default="toy", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    most = max(arguments.gpus)
    if not arguments.toy and torch.cuda.device_count() < most:
        print(f"scaling needs {most} GPUs and found {torch.cuda.device_count()}: nothing was measured (--toy tries it)")
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with locked(arguments.out):
        try:
            record, session = begun(arguments)
        except ValueError as error:
            if arguments.out != OUT:
                parser.error(str(error))
            print(f"nothing was measured: {error}")  # the shipped record, on another machine
            return
        fill(record, session, arguments)


if __name__ == "__main__":
    main()
