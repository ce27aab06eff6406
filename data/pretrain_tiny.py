"""Pretrains the base model ``tiny``: from Debian's packages to data/tiny/, in three steps.

    sudo apt-get install wordnet-base python3.11-doc dict-devil dict-jargon
    python data/pretrain_tiny.py prepare                 # tokenizer and token ids, into build/pretraining/ (a minute)
    python data/pretrain_tiny.py train d192-long-decay   # one of the settings below, on a GPU (a few minutes)
    python data/pretrain_tiny.py finish d192-long-decay  # writes data/tiny/ and data/runs/tiny_pretraining.json

    python data/pretrain_tiny.py run d192-long-decay     # the first two, and their record, as lora-edu full-run does

The shipped setting trains for one or two minutes on an H100: killed in the middle, it begins again. ``run`` keeps what
is prepared and writes under build/pretraining/ only; data/tiny/ and its record change by ``finish`` alone.

The model reads WordNet's glosses, under every word of a synset, WordNet's example sentences, and the prose of the
Python documentation. It never reads The Devil's Dictionary or the Jargon File: their training splits only help to
choose the tokenizer's pieces, so that their punctuation is not cut into single bytes.
"""

import argparse
import json
import math
import os
import platform
import random
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "build" / "pretraining"
VOCABULARY, BLOCK, BLOCKS, SEED = 4096, 128, 256, 0

# Width, layers, heads, ff, tied embeddings, peak learning rate, weight decay, steps, sources.
ALL = ("wordnet", "examples", "python")
SETTINGS: dict[str, dict[str, Any]] = {
    "first-try": dict(
        d=128, layers=4, heads=4, ff=384, tied=True, lr=3e-3, decay=0.1, steps=2500, sources=("wordnet-first",)
    ),
    "d128-untied": dict(d=128, layers=4, heads=4, ff=384, tied=False, lr=4e-3, decay=0.1, steps=1500, sources=ALL),
    "d160": dict(d=160, layers=4, heads=5, ff=448, tied=True, lr=4e-3, decay=0.1, steps=1500, sources=ALL),
    "d160-slow": dict(d=160, layers=4, heads=5, ff=448, tied=True, lr=2e-3, decay=0.1, steps=1500, sources=ALL),
    "d192": dict(d=192, layers=3, heads=6, ff=384, tied=True, lr=4e-3, decay=0.1, steps=1500, sources=ALL),
    "d192-decay": dict(d=192, layers=3, heads=6, ff=384, tied=True, lr=4e-3, decay=0.3, steps=1500, sources=ALL),
    "d192-long": dict(d=192, layers=3, heads=6, ff=384, tied=True, lr=4e-3, decay=0.3, steps=4000, sources=ALL),
    "d192-long-decay": dict(d=192, layers=3, heads=6, ff=384, tied=True, lr=4e-3, decay=0.6, steps=4000, sources=ALL),
    "d128-deep": dict(d=128, layers=6, heads=4, ff=384, tied=True, lr=4e-3, decay=0.1, steps=1500, sources=ALL),
}


# --- train: packed blocks, each document sees itself only -------------------------------------------------------------


def packed(documents: list[np.ndarray], generator: random.Random) -> Tensor:
    """All documents in a new order, one after another, cut into blocks of 128 tokens: (blocks, 128)."""
    order = list(range(len(documents)))
    generator.shuffle(order)
    ids = np.concatenate([documents[i] for i in order])
    return torch.from_numpy(ids[: ids.size // BLOCK * BLOCK].astype(np.int64)).view(-1, BLOCK)


def own_document(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Attention mask (batch, 1, 128, 128), true where a token may look, and positions counted from each <bos>."""
    starts = ids == 1
    number = starts.cumsum(1)
    places = torch.arange(ids.shape[1], device=ids.device)
    first = torch.where(starts, places, 0).cummax(1).values
    mask = (number[:, :, None] == number[:, None, :]) & (places[:, None] >= places[None, :])
    return mask[:, None], places - first


@torch.no_grad()
def held_out_loss(model: Any, rows: Tensor, given: Tensor) -> dict[str, float]:
    """Mean loss per token of the definitions (with eos) and of whole lines; rows are (entries, 128), 0 is padding."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for ids, prompt in zip(rows.split(256), given.split(256), strict=True):
        with torch.autocast(rows.device.type, torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
        real = ids[:, 1:] != 0
        answer = real & (torch.arange(1, ids.shape[1], device=ids.device) >= prompt[:, None])
        sums += torch.stack([losses[answer].sum(), answer.sum(), losses[real].sum(), real.sum()]).double().cpu()
    model.train()
    return {"definition": float(sums[0] / sums[1]), "line": float(sums[2] / sums[3])}


def llama(setting: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=setting["d"],
        intermediate_size=setting["ff"],
        num_hidden_layers=setting["layers"],
        num_attention_heads=setting["heads"],
        num_key_value_heads=setting["heads"],
        max_position_embeddings=256,
        tie_word_embeddings=setting["tied"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def train(name: str, out: Path, steps: int | None) -> None:
    """Pretrain one setting; keep the weights of the lowest held-out loss, rounded to bfloat16."""
    from safetensors.torch import save_file

    setting = SETTINGS[name] | ({"steps": steps} if steps else {})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)
    generator = random.Random(SEED)
    arrays = np.load(WORK / "tokens.npz")
    rows = torch.from_numpy(arrays["held_out"].astype(np.int64)).to(device)
    given = torch.from_numpy(arrays["given"]).to(device)
    documents = []
    for source in setting["sources"]:
        ids = arrays[f"source {source}"]
        documents += np.split(ids, np.flatnonzero(ids == 1)[1:])
    model = llama(setting).to(device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": setting["decay"]}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=setting["lr"], betas=(0.9, 0.98), fused=device == "cuda")
    log, best, since, start = [], {"definition": math.inf}, 0, time.time()
    weights: dict[str, Tensor] = {}
    blocks, used, total = packed(documents, generator), 0, setting["steps"]
    for step in tqdm(range(1, total + 1), desc=name, mininterval=20):
        if used + BLOCKS > len(blocks):
            blocks, used = packed(documents, generator), 0
        ids = blocks[used : used + BLOCKS].to(device, non_blocking=True)
        used += BLOCKS
        rate = setting["lr"] * min(step / 200, 0.5 * (1 + math.cos(math.pi * step / total)) * 0.98 + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = rate
        mask, positions = own_document(ids)
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        target = ids[:, 1:].masked_fill(ids[:, 1:] == 1, -100)  # nothing in a document says that another one begins
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), target.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == total:
            held_out = held_out_loss(model, rows, given)
            log.append({"step": step, "train": round(loss.item(), 4), **{k: round(v, 4) for k, v in held_out.items()}})
            if held_out["definition"] < best["definition"]:
                best, since = {"step": step, **held_out}, 0
                weights = {k: v.detach().to("cpu", torch.bfloat16).clone() for k, v in model.state_dict().items()}
            else:
                since += 1
            if since >= 6:
                break
    seconds = time.time() - start
    model.load_state_dict(weights)
    best["rounded to bfloat16"] = held_out_loss(model, rows, given)
    if setting["tied"]:
        weights.pop("lm_head.weight", None)
    record = {
        "setting": {"name": name, **setting, "seed": SEED, "vocabulary": VOCABULARY, "tokens a step": BLOCKS * BLOCK},
        "parameters": sum(p.numel() for p in model.parameters()),
        "best": best,
        "seconds": round(seconds, 1),
        "date": date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "versions": {"torch": torch.__version__, "transformers": __import__("transformers").__version__},
        "log": log,
    }
    unfinished = out / f"{name}.unfinished"  # not a .safetensors yet: whole, or not there
    save_file(weights, unfinished, metadata={"format": "pt", "record": json.dumps(record)})
    os.replace(unfinished, out / f"{name}.safetensors")
    print(name, record["parameters"], json.dumps(best), f"{seconds:.0f} s")


def run(name: str, out: Path, steps: int | None, record: Path) -> None:
    """Prepare if that is not done, train, and write the record; nothing outside of these places."""
    if not torch.cuda.is_available() and steps is None:
        print("tiny_pretraining needs a GPU and found none: nothing was trained (hours on a CPU; --steps 20 tries it)")
        return
    if record.resolve() == (HERE / "runs" / "tiny_pretraining.json").resolve():
        sys.exit(f"{record} belongs to the weights in data/tiny: 'finish' writes both; give another --record")
    if not ((WORK / "tokens.npz").exists() and (WORK / "facts.json").exists()):
        prepared()
    train(name, out, steps)
    record.parent.mkdir(parents=True, exist_ok=True)
    unfinished = record.with_name(record.name + ".unfinished")
    unfinished.write_text(json.dumps(report(name, records(out)), indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, record)
    print(f"recorded in {record}; data/tiny is as it was ('finish' would write it)")


def prepared() -> None:
    from pretraining_text import prepare  # not needed, nor its packages, on the machine that trains

    prepare(WORK, VOCABULARY, BLOCK)


def records(out: Path) -> dict[str, Any]:
    """What was written down of every trained setting in the folder."""
    from safetensors import safe_open

    found = {}
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found[path.stem] = json.loads(file.metadata()["record"])
    return found


def report(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of the chosen setting, the text, and all settings."""
    facts = json.loads((WORK / "facts.json").read_text())
    command = f"python data/pretrain_tiny.py train {name}"
    return {"chosen": name, "command": command, "text": facts, "settings": settings}


# --- finish: what is committed ----------------------------------------------------------------------------------------


def finish(name: str, out: Path) -> None:
    """Write data/tiny/ from one trained setting, and the record of all settings found beside it."""
    from safetensors import safe_open
    from transformers import AutoTokenizer

    settings = records(out)
    with safe_open(out / f"{name}.safetensors", "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    model = llama(settings[name]["setting"]).to(torch.bfloat16)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or missing not in ([], ["lm_head.weight"]):
        sys.exit(f"{name}: the file does not fit the model; missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.save_pretrained(HERE / "tiny")
    AutoTokenizer.from_pretrained(WORK / "tokenizer").save_pretrained(HERE / "tiny")
    about = HERE / "tiny" / "tokenizer_config.json"  # less the two fields that describe how it was loaded just now
    kept = {k: v for k, v in json.loads(about.read_text()).items() if k not in ("is_local", "local_files_only")}
    about.write_text(json.dumps(kept | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
    for path in (HERE / "tiny").iterdir():
        path.chmod(0o644)
    (HERE / "runs").mkdir(exist_ok=True)
    (HERE / "runs" / "tiny_pretraining.json").write_text(json.dumps(report(name, settings), indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "train", "finish", "run"))
    parser.add_argument("setting", nargs="?", choices=tuple(SETTINGS), help="needed by all but prepare")
    parser.add_argument("--out", type=Path, default=WORK / "models", help="where trained settings are kept")
    parser.add_argument("--record", type=Path, default=WORK / "tiny_pretraining.json", help="what run writes")
    parser.add_argument("--steps", type=int, help="fewer steps, to try the script")
    arguments = parser.parse_args()
    if arguments.step == "prepare":
        prepared()
    elif not arguments.setting:
        parser.error(f"{arguments.step} needs a setting: {', '.join(SETTINGS)}")
    else:
        arguments.out.mkdir(parents=True, exist_ok=True)
        if arguments.step == "train":
            train(arguments.setting, arguments.out, arguments.steps)
        elif arguments.step == "run":
            run(arguments.setting, arguments.out, arguments.steps, arguments.record)
        else:
            finish(arguments.setting, arguments.out)


if __name__ == "__main__":
    main()
