"""The loss over a large vocabulary, whole or in pieces: a LoRA step of Llama-3-8B's shape. For lesson 24; needs a GPU.

    python benchmarks/loss_8b.py                     # writes data/runs/loss_8b.json
    python benchmarks/loss_8b.py --toy --out x.json  # the same code on a tiny shape, on any machine

LoRA of r = 16 on all linear layers, bfloat16, gradient checkpointing in every block, random weights: neither times nor
bytes depend on their values. One model and one optimizer; the ways differ in the loss alone, and take a step in turns.
"activations" is the highest memory of a forward and backward pass above what stood there before, gradients left out.
Liger's loss is compared where liger-kernel is installed.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from memory_7b import CUDA, DEVICE, SEED, allocated, empty, new_model, peak, reset_peak, synchronize
from torch import Tensor
from transformers import LlamaConfig

from lora_edu import LoraConfig, inject
from lora_edu.counting.measure import paired_times
from lora_edu.counting.meta import load_config
from lora_edu.fast.loss import loss_in_pieces
from lora_edu.lab.recording.records import surroundings, write_record

try:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
except ImportError:
    LigerFusedLinearCrossEntropyLoss = None

OUT = Path(__file__).resolve().parents[1] / "data" / "runs" / "loss_8b.json"
R = 16
PIECES = (256, 512, 1024, 2048)
TOY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}


def losses(model: Any, ids: Tensor) -> dict[str, Callable[[], Tensor]]:
    """name → the loss of one batch."""
    compiled = torch.compile(model.loss_function, dynamic=False)

    def whole() -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def whole_compiled() -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return compiled(logits=logits, labels=ids, vocab_size=logits.shape[-1])

    def liger() -> Tensor:
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        return LigerFusedLinearCrossEntropyLoss()(model.get_output_embeddings().weight, hidden, ids[:, 1:].flatten())

    found = {"whole": whole, "whole, compiled": whole_compiled}
    for rows in PIECES:
        found[f"pieces of {rows}"] = lambda rows=rows: loss_in_pieces(model, ids, ids, rows)
    return found | ({"liger": liger} if LigerFusedLinearCrossEntropyLoss else {})


def compare(config: LlamaConfig, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Every way's times in turns, its loss and its activations."""
    model: Any = new_model(config)
    torch.manual_seed(SEED)
    inject(model, LoraConfig(r=R, lora_alpha=R, target_modules="all-linear"), autocast_adapter_dtype=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=CUDA)  # the weights stay, so that all see the same ones
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(config.vocab_size, (batch, tokens), generator=generator).to(DEVICE)

    def step(loss: Callable[[], Tensor]) -> float:
        found = loss()
        found.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        return found.item()

    ways = losses(model, ids)
    lines: dict[str, Any] = {}
    for name, loss in ways.items():
        step(loss)
        empty()
        before = allocated()
        reset_peak()
        loss().backward()
        gradients = sum(p.grad.numel() * p.grad.element_size() for p in trained if p.grad is not None)
        lines[name] = {"activations_bytes": peak() - before - gradients}
        optimizer.zero_grad(set_to_none=True)
        lines[name]["loss"] = round(step(loss), 4)
        print(f"{name:18} ready, loss {lines[name]['loss']}", flush=True)
    times = paired_times({name: lambda loss=loss: step(loss) for name, loss in ways.items()}, rounds, warmup=2)
    for name, line in lines.items():
        line["steps_ms"] = [round(1e3 * seconds, 3) for seconds in times.seconds[name]]
        line["against_whole"] = round(times.ratio(name, "whole"), 4)
        whole = lines["whole"]["activations_bytes"]
        line["activations_of_whole"] = round(line["activations_bytes"] / whole, 4) if whole else None
    return {"batch": batch, "tokens": tokens, "vocabulary": config.vocab_size, "ways": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--toy", action="store_true", help="a tiny model, to try the script")
    arguments = parser.parse_args()
    if not CUDA and not arguments.toy:
        print("loss_8b needs a GPU and found none: nothing was measured (--toy tries the script)")
        return
    config = LlamaConfig(**TOY) if arguments.toy else load_config("llama-3-8b")
    batch, tokens = (2, 16) if arguments.toy else (4, 2048)
    record = {"what": __doc__.split("\n")[0], "seed": SEED, "r": R, "rounds": arguments.rounds}
    record |= {"command": " ".join(["python", "benchmarks/loss_8b.py", *sys.argv[1:]])}
    record |= {"machine": surroundings("bfloat16")} | compare(config, batch, tokens, arguments.rounds)
    write_record(record, arguments.out)
    for name, line in record["ways"].items():
        print(
            f"{name:18} {median(line['steps_ms']):8.1f} ms  {line['against_whole']:.3f} of whole  "
            f"{line['activations_bytes'] / 2**30:6.2f} GiB of activations"
        )


if __name__ == "__main__":
    main()
