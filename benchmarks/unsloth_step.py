"""A LoRA step as Unsloth takes it: one of the ways of speed_7b.py, where Unsloth is installed.

Unsloth rewrites transformers and PEFT when it is imported, so that no other way could be measured beside it in one
process. It gets a process of its own on the same card. That process waits for a word, takes one training step and
answers; so the steps are still taken in turns. The model, saved to disk before, has the weights of all other ways.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def installed() -> str | None:
    """Unsloth's version, or None where it is not installed."""
    return version("unsloth") if find_spec("unsloth") else None


class UnslothStep:
    """Unsloth's step in its own process, with the attributes of speed_7b's ``Step``.

    Args:
        folder: the model, as ``save_pretrained`` writes it; the worker keeps what it compiles beside it.
        ids: the batch, (rows, tokens).
        r: the rank; alpha is the same.
        bf16: cast the adapters to bfloat16. Unsloth has no setting for that and keeps them in float32.
        worker: what to start; a test starts another one.

    Raises:
        ChildProcessError: if the process ends before it is ready or in a step; its own words stand above.
    """

    def __init__(self, folder: Path, ids: Tensor, r: int, bf16: bool, worker: Path = Path(__file__)):
        arguments = [str(folder), *map(json.dumps, (ids.tolist(), r, bf16))]
        surroundings = os.environ | {"UNSLOTH_COMPILE_LOCATION": str(folder / "compiled"), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(worker), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=surroundings,
        )  # fmt: skip
        ready = self.answer()
        self.trainable: int = ready["trainable"]
        self.peak: int = ready["peak"]
        self.losses: list[Tensor] = []

    def answer(self) -> dict[str, Any]:
        """The next line that the process says to us; what libraries print in between goes to the screen."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(SAYS):
                return json.loads(line.removeprefix(SAYS))
            print(f"    {line}", end="", flush=True)
        raise ChildProcessError(f"Unsloth's process ended with code {self.process.wait()}: see what it said above")

    def __call__(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; the answer says so
            print("step", file=self.process.stdin, flush=True)
        self.losses.append(torch.tensor(self.answer()["loss"]))

    def close(self) -> None:
        """End the process, so that its memory is free for what comes next."""
        self.process.communicate()


SAYS = "unsloth_step says "


def say(**what: Any) -> None:
    """Send a line to the process that started this one."""
    print(SAYS + json.dumps(what), flush=True)


def main() -> None:
    """The worker: load, take three steps, say what that took, then one step for every line that comes in."""
    folder, (ids, r, bf16) = Path(sys.argv[1]), map(json.loads, sys.argv[2:])
    batch = torch.tensor(ids, device="cuda")
    from unsloth import FastLanguageModel  # before transformers: it patches what it finds

    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=batch.shape[1], dtype=torch.bfloat16, load_in_4bit=False, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=r, lora_alpha=r, target_modules=ADAPTED, use_gradient_checkpointing=False, random_state=0
    )
    FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if bf16:
        for parameter in trained:
            parameter.data = parameter.data.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)

    def step() -> float:
        with torch.autocast("cuda", torch.bfloat16):  # as Unsloth's trainer calls it
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    say(trainable=sum(parameter.numel() for parameter in trained), peak=torch.cuda.max_memory_allocated())
    torch.cuda.empty_cache()
    for _ in sys.stdin:
        loss = step()
        torch.cuda.synchronize()
        say(loss=loss)


if __name__ == "__main__":
    main()
