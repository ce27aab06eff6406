"""Builds data/texts from Debian's dictionary packages: parse, drop what data/exclusions.txt lists, split, compress.

    sudo apt-get install dict-devil dict-jargon wordnet-base      # the sources
    python data/build.py                                          # writes data/texts/*.jsonl.gz
    python data/build.py --check                                  # compares instead of writing

The result depends on the packages, on this file, dictionaries.py and exclusions.txt only. What each text is, and its
licence, is in data/README.md. A line holds "word", "pos", "definition", "split"; WordNet's also "topic", and those of
the classification subset "label".
"""

import argparse
import gzip
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from dictionaries import Entry, devils_dictionary, jargon, wordnet_synsets

HERE = Path(__file__).resolve().parent
CLASSES = ("act", "animal", "artifact", "body", "communication", "food", "location", "plant", "state", "substance")
PER_CLASS = {"train": 300, "validation": 50, "test": 75}


def wordnet_entries(synsets: Iterable[Entry]) -> Iterator[Entry]:
    """One entry a synset, under its first word."""
    for synset in synsets:
        yield {"word": synset["words"][0], **{key: synset[key] for key in ("pos", "definition", "topic")}}


# --- What is left out -------------------------------------------------------------------------------------------------


def exclusions(path: Path = HERE / "exclusions.txt") -> dict[str, list[str]]:
    """The sections of the exclusion list, comments and empty lines removed."""
    sections: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("[") and line.endswith("]"):
            current = sections.setdefault(line[1:-1], [])
        elif line.strip() and not line.startswith("#"):
            current.append(line)
    return sections


def excluded_words() -> re.Pattern[str]:
    """One pattern for the words that occur nowhere in this course: not in the data, not in what a model printed."""
    return re.compile(r"\b(?:" + "|".join(exclusions()["words"]) + r")\b", re.IGNORECASE)


def wanted(entries: Iterable[Entry], name: str) -> Iterator[Entry]:
    """The entries that no rule excludes; ``name`` selects the section of headwords, or of patterns for WordNet."""
    words, listed = excluded_words(), exclusions()
    heads = {head.lower() for head in listed.get(name, [])}
    glosses = re.compile("|".join(listed["wordnet"]), re.IGNORECASE) if name == "wordnet" else None
    for entry in entries:
        text = " ".join([entry["word"], *entry.get("words", []), entry["definition"]])
        if words.search(text) or entry["word"].lower() in heads or (glosses and glosses.search(text)):
            continue
        yield entry


def useful(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Entries with a definition of their own: not empty, and not only a reference to another entry."""
    for entry in entries:
        text = entry["definition"]
        if len(text) > 2 and not re.fullmatch(
            r"(?:See|Syn\.?|Synonym)\b[^.]*(?:\bfor\b)?[^.]*\.?", text, re.IGNORECASE
        ):
            yield entry


# --- Splitting and writing --------------------------------------------------------------------------------------------


def split(entries: Iterable[Entry], shares: tuple[int, int] = (10, 10)) -> list[Entry]:
    """Add the field "split": ``shares`` per cent go to validation and test, the rest to train.

    Entries that share a headword or a definition form a group and stay together; the group's place is drawn by a
    hash of its texts, so that it depends on nothing else.
    """
    rows = list({(e["word"], e["pos"], e["definition"]): e for e in entries}.values())
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for row in rows:
        a, b = root("word " + row["word"].lower()), root("text " + row["definition"].lower())
        parent[max(a, b)] = min(a, b)
    for row in rows:
        draw = int(hashlib.sha256(root("word " + row["word"].lower()).encode()).hexdigest(), 16) % 100
        validation, test = shares
        row["split"] = "validation" if draw < validation else "test" if draw < validation + test else "train"
    return rows


def topics(glosses: list[Entry]) -> list[Entry]:
    """The balanced subset for classification: the same number of nouns of each of ten topics, drawn by hash."""
    rows = []
    for label, topic in enumerate(CLASSES):
        mine = [{**row, "topic": topic, "label": label} for row in glosses if row["topic"] == f"noun.{topic}"]
        mine.sort(key=lambda row: hashlib.sha256(f"{row['word']}: {row['definition']}".encode()).hexdigest())
        for name, number in PER_CLASS.items():
            rows += [row for row in mine if row["split"] == name][:number]
    return sorted(rows, key=lambda row: hashlib.sha256(row["definition"].encode()).hexdigest())


def compressed(rows: list[Entry]) -> bytes:
    """JSON lines, gzip without a time stamp: the same rows give the same bytes."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return gzip.compress(lines.encode("utf-8"), compresslevel=9, mtime=0)


def build() -> dict[str, list[Entry]]:
    """All data sets by name, ready to be written."""
    synsets = list(wordnet_synsets())
    words = {word for synset in synsets for word in synset["words"]}
    names = {word for word in words if word[:1].isupper() and word.lower() not in words}
    wordnet = ({**entry, "word": entry["words"][0]} for entry in synsets)
    glosses = split(wordnet_entries(useful(wanted(wordnet, "wordnet"))), (5, 5))
    return {
        "devils_dictionary": split(useful(wanted(devils_dictionary(names), "devils_dictionary")), (12, 12)),
        "jargon": split(useful(wanted(jargon(), "jargon"))),
        "wordnet_glosses": glosses,
        "wordnet_topics": topics(glosses),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a committed file differs")
    arguments = parser.parse_args()
    different = []
    for name, rows in build().items():
        path, content = HERE / "texts" / f"{name}.jsonl.gz", compressed(rows)
        counts = Counter(row["split"] for row in rows)
        print(f"{path.name:<28} {len(content):>9,} bytes  {dict(counts)}  sha256 {hashlib.sha256(content).hexdigest()}")
        if arguments.check and (not path.exists() or gzip.decompress(path.read_bytes()) != gzip.decompress(content)):
            different.append(path.name)
        elif not arguments.check:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    if different:
        sys.exit(f"differs from what is committed: {', '.join(different)}")


if __name__ == "__main__":
    main()
