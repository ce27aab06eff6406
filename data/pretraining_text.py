"""What ``tiny`` reads before the course: the documents, the tokenizer made for them, and their ids. The first step of
data/pretrain_tiny.py."""

import hashlib
import html
import json
import re
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import build
import dictionaries
from lora_edu.lab.datasets import format_entry, load_dataset

PYTHON_DOCS = Path("/usr/share/doc/python3.11/html")
SPECIAL = ["<pad>", "<bos>", "<eos>"]


def python_prose() -> list[str]:
    """Paragraphs of the Python documentation, as plain text; glossary terms as 'term: definition'."""
    if not PYTHON_DOCS.exists():
        sys.exit(f"{PYTHON_DOCS} is missing: install the Debian package with 'apt-get install python3.11-doc'")
    found: dict[str, None] = {}
    for path in sorted(PYTHON_DOCS.rglob("*.html")):
        if path.parent.name in ("_static", "distutils", "whatsnew") or path.name in (
            "genindex-all.html",
            "search.html",
        ):
            continue
        page = re.sub(r"<pre>.*?</pre>|<script.*?</script>", " ", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for inside in re.findall(r"<p>(.*?)</p>", page, flags=re.DOTALL):
            text = dictionaries.tidy(html.unescape(re.sub(r"<[^>]+>", "", inside)).replace("¶", ""))
            if len(text) >= 40 and re.search(r"[.:?!)]$", text) and text.isascii():
                found.setdefault(text)
    return list(found)


def corpus() -> dict[str, list[str]]:
    """Documents by source. Only training entries; no other word of theirs may be a held-out headword."""
    banned, train = build.excluded_words(), load_dataset("wordnet_glosses", "train")
    held_out = {row["word"].lower() for part in ("validation", "test") for row in load_dataset("wordnet_glosses", part)}
    known = {(row["word"], row["pos"], row["definition"]) for row in train}
    sources: dict[str, list[str]] = {"wordnet-first": ["".join(format_entry(row)) for row in train]}
    entries, examples = [], []
    for synset in dictionaries.wordnet_synsets():
        if (synset["words"][0], synset["pos"], synset["definition"]) not in known:
            continue
        words = [word for word in dict.fromkeys(synset["words"]) if word.lower() not in held_out]
        entries += ["".join(format_entry({**synset, "word": word})) for word in words]
        examples += [text for text in synset["examples"] if len(text) > 15]
    python = python_prose()
    sources |= {"wordnet": entries, "examples": examples, "python": python}
    return {name: [text for text in texts if not banned.search(text)] for name, texts in sources.items()}


def prepare(folder: Path, vocabulary: int, block: int) -> None:
    """Train the tokenizer, encode everything (documents cut at ``block`` tokens), and write both to ``folder``."""
    sources = corpus()
    others = ["".join(format_entry(row)) for name in ("devils_dictionary", "jargon") for row in load_dataset(name)]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet)
    raw.train_from_iterator(sources["wordnet-first"] + sources["examples"] + sources["python"] + 4 * others, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=256
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    arrays, facts = {}, {}
    for name, texts in sources.items():
        ids = [[1, *row.ids, 2][:block] for row in raw.encode_batch(texts)]
        arrays[name] = np.concatenate([np.array(row, np.uint16) for row in ids])
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        facts[name] = {"documents": len(texts), "tokens": int(arrays[name].size), "sha256": digest}
    held_out = [format_entry(row) for row in load_dataset("wordnet_glosses", "validation")]
    prompts, answers = raw.encode_batch([p for p, _ in held_out]), raw.encode_batch([a for _, a in held_out])
    rows = np.zeros((len(held_out), block), np.uint16)
    given = np.array([1 + len(prompt.ids) for prompt in prompts])
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        ids = [1, *prompt.ids, *answer.ids, 2][:block]
        row[: len(ids)] = ids
    np.savez(folder / "tokens.npz", **{f"source {k}": v for k, v in arrays.items()}, held_out=rows, given=given)
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))
