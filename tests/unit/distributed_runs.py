"""Small training runs for test_distributed.py, which does them in one process and, through accelerate launch, in two.

``accelerate launch --config_file data/accelerate/fsdp.yaml tests/unit/distributed_runs.py FOLDER FOLDER`` does them all
twice: every process with the whole model, then with shards of it.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn

from lora_edu import LoraConfig, inject, load_base, load_dataset, save_adapter
from lora_edu.lab.datasets import encode, encode_topics
from lora_edu.lab.distributed import process_state, shard_on_the_cpu
from lora_edu.lab.training import evaluate, generate, set_seed, train

RUNS = ["lora", "stopped", "full", "classifier", "peft"]


class Noting(nn.Module):
    """Adds to the loss, and notes the gradient that it sees."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 2.0, dtype=torch.float64))
        self.seen: list[float] = []

    def extra_loss(self):
        return 3 * self.weight.sum()

    def after_backward(self, step):
        self.seen.append(self.weight.grad.sum().item())


def texts(tokenizer, split="train"):
    return encode(load_dataset("devils_dictionary", split)[:9], tokenizer, max_length=24)


def lora():
    """Nine rows in batches of three, one of which asks for nothing: shares of two and of one row, or of none."""
    model, tokenizer = load_base("tiny", dtype=torch.float64)
    rows = texts(tokenizer)
    rows[0] = rows[0] | {"labels": [-100] * len(rows[0]["labels"])}
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    held_out = {"a": texts(tokenizer, "validation")}
    # Clipped to a small norm: were each process to clip its own shards or gradients, the update would differ.
    history = train(model, rows, steps=5, batch_size=3, warmup_steps=3, max_grad_norm=0.1, eval_data=held_out)
    after = [evaluate(model, held_out["a"]), *generate(model, tokenizer, ["politician (noun):"], max_new_tokens=8)]
    more = train(model, rows, steps=1, batch_size=3)  # the model can be trained again
    return model, history, [after, more.train_loss]


def stopped():
    """Early stopping, and modules that add to the loss and see the gradients."""
    model, tokenizer = load_base("tiny", dtype=torch.float64)
    inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
    model.noting = Noting()
    rows = texts(tokenizer)
    history = train(model, rows, steps=9, learning_rate=0.3, eval_data=rows[:2], eval_every=1, patience=1)
    return model, history, model.noting.seen


def full():
    """Every weight, in float32."""
    model, tokenizer = load_base("tiny")
    return model, train(model, texts(tokenizer), steps=3, learning_rate=1e-4, batch_size=4), None


def classifier():
    """One label for each row, and a head that is trained whole."""
    model, tokenizer = load_base("tiny", head="classification", num_labels=10, dtype=torch.float64)
    rows = encode_topics(load_dataset("wordnet_topics")[:12], tokenizer)
    inject(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["score"]))
    return model, train(model, rows, steps=3, batch_size=5, eval_data=rows[:4]), None


def peft():
    """An adapter of PEFT's."""
    model, tokenizer = load_base("tiny", dtype=torch.float64)
    model = get_peft_model(model, PeftConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return model, train(model, texts(tokenizer), steps=3, batch_size=4), None


def dropout():
    """Each process draws its own: two equal rows then differ, where one stream for all would treat them alike."""
    model, tokenizer = load_base("tiny", dtype=torch.float64)
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False))
    rows = texts(tokenizer)[:1]
    state = process_state()
    drawn = {}
    hook = lambda module, _, output: drawn.setdefault("y", output.detach().clone())  # noqa: E731
    model.get_submodule("model.layers.0.self_attn.q_proj").dropout.register_forward_hook(hook)
    history = train(model, rows, steps=1, batch_size=2)
    return model, history, [state.process_index, (drawn["y"][0].flatten()[:64] == 0).tolist()]


def run(case, folder):
    """Train, and leave losses and weights in the folder."""
    set_seed(0)
    model, history, more = globals()[case]()
    index = process_state().process_index
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    assert type(model).__name__.startswith(("Llama", "Peft"))  # no wrapper and no shards
    save_file(weights, folder / f"{case} {index}.safetensors")
    if case == "lora":
        save_adapter(model, folder / f"adapter {index}")
    (folder / f"{case} {index}.json").write_text(json.dumps([vars(history), more]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    whole, sharded = map(Path, sys.argv[1:])
    for case in [*RUNS, "dropout"]:
        run(case, whole)
    shard_on_the_cpu()
    for case in RUNS:
        run(case, sharded)
    process_state().wait_for_everyone()
    process_state().destroy_process_group()
