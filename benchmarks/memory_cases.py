"""Two micro-batches, autocast, and a job too large for the card: memory of a 7B-shaped Llama, for lesson 06.

    python benchmarks/memory_cases.py                     # writes data/runs/memory_cases.json
    python benchmarks/memory_cases.py --toy --out x.json  # the same code on a tiny shape, on any machine

Methods, model and optimizer are those of memory_7b.py; bytes depend on no value of the weights. "kept" is what the
forward pass leaves behind; the peaks are those of an optimizer step after one and after two micro-batches. The last job
has a batch that does not fit, and its error message is recorded as PyTorch wrote it.
"""

import argparse
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from memory_7b import CUDA, DEVICE, METHODS, SEED, TOY, allocated, clean, empty, new_model, peak, prepare, reset_peak
from transformers import LlamaConfig

from lora_edu.counting.meta import load_config
from lora_edu.lab.recording.records import surroundings, write_record

OUT = Path(__file__).resolve().parents[1] / "data" / "runs" / "memory_cases.json"
CASES = ["full, all bf16", "lora q,v r=8", "lora all-linear r=16", "lora all-linear r=16, fp32 adapter"]
BATCH, TOKENS = 4, 512
TOO_LARGE = "lora all-linear r=16, fp32 adapter"


def measure(model: Any, method: str, checkpointing: bool, autocast: bool) -> dict[str, Any]:
    """What one forward pass keeps, and the peaks of a step with one and with two micro-batches."""
    ids = random_ids(model, BATCH, TOKENS)
    optimizer = prepare(model, METHODS[method])

    def loss() -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    def step(micro_batches: int) -> int:
        reset_peak()
        for _ in range(micro_batches):
            loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return peak()

    step(1)  # creates the optimizer's state
    before = allocated()
    held = loss()
    kept = allocated() - before
    del held
    what = {"method": method, "batch": BATCH, "tokens": TOKENS, "checkpointing": checkpointing, "autocast": autocast}
    peaks = {f"peak_{number}": step(number) for number in (1, 2)}
    return what | {"before_bytes": before, "kept_bytes": kept, **peaks}


def random_ids(model: Any, batch: int, tokens: int) -> torch.Tensor:
    """Token ids of the wanted shape."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=generator).to(DEVICE)


def set_checkpointing(model: Any, on: bool) -> None:
    """Turn gradient checkpointing on or off."""
    if on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def out_of_memory(model: Any) -> dict[str, Any]:
    """The error of a step with more rows than fit on the card."""
    capacity = torch.cuda.get_device_properties(0).total_memory
    batch = 16 * max(1, round(capacity / (80 * 2**30)))
    prepare(model, METHODS[TOO_LARGE])
    ids = random_ids(model, batch, TOKENS)
    try:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    except torch.OutOfMemoryError as error:
        last = traceback.extract_tb(error.__traceback__)
        calls = [f"{Path(each.filename).name}, in {each.name}: {each.line}" for each in last]
        calls = [call for call in calls if "_wrapped_call_impl" not in call and "_call_impl" not in call]
        job = {"method": TOO_LARGE, "batch": batch, "tokens": TOKENS, "checkpointing": False, "autocast": False}
        return job | {"capacity_bytes": capacity, "calls": calls, "message": str(error).strip()}
    raise SystemExit(f"{batch} rows of {TOKENS} tokens fit on this card: nothing to record")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--toy", action="store_true", help="a tiny model, to try the script")
    arguments = parser.parse_args()
    if not CUDA and not arguments.toy:
        print("memory_cases needs a GPU of 80 GB or more and found none: nothing was measured (--toy tries the script)")
        return
    model: Any = new_model(LlamaConfig(**TOY) if arguments.toy else load_config("llama-7b"))
    record: dict[str, Any] = {"what": __doc__.split("\n")[0], "seed": SEED}
    record |= {"command": " ".join(["python", "benchmarks/memory_cases.py", *sys.argv[1:]])}
    record |= {"machine": surroundings("bfloat16"), "runs": []}
    for method in CASES:
        for checkpointing in (False, True):
            set_checkpointing(model, checkpointing)
            for autocast in (False, True):
                line = measure(model, method, checkpointing, autocast)
                record["runs"].append(line)
                print(*(f"{name} {value}" for name, value in line.items()), sep="  ", flush=True)
                clean(model)
    if CUDA and not arguments.toy:
        set_checkpointing(model, False)
        record["out_of_memory"] = out_of_memory(model)
        print(record["out_of_memory"]["message"])
    empty()
    write_record(record, arguments.out)


if __name__ == "__main__":
    main()
