"""Reads the three dictionaries from Debian's packages: one generator of entries each. Used by data/build.py."""

import gzip
import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = {
    "dict-devil": Path("/usr/share/dictd/devil.dict.dz"),
    "dict-jargon": Path("/usr/share/dictd/jargon.dict.dz"),
    "wordnet-base": Path("/usr/share/wordnet/data.noun"),
}
Entry = dict[str, Any]
POS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
# WordNet's lexicographer files in the order of their numbers (manual page lexnames.5WN).
# fmt: off
TOPICS = (
    ["adj.all", "adj.pert", "adv.all"]
    + ["noun." + name for name in (
        "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling",
        "food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process",
        "quantity", "relation", "shape", "state", "substance", "time")]
    + ["verb." + name for name in (
        "body", "change", "cognition", "communication", "competition", "consumption", "contact", "creation", "emotion",
        "motion", "perception", "possession", "social", "stative", "weather")]
    + ["adj.ppl"]
)
# fmt: on


def read_package(package: str, path: Path | None = None) -> str:
    """The text of a package's dictionary file (dictzip is gzip with an index; gzip reads it)."""
    path = path or PACKAGES[package]
    if not path.exists():
        sys.exit(f"{path} is missing: install the Debian package with 'apt-get install {package}' and run this again")
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".dz" else raw).decode("utf-8", errors="replace")


def tidy(text: str) -> str:
    """One line of plain punctuation: straight quotes, ' -- ' for dashes, no underscores of emphasis, single spaces."""
    text = unicodedata.normalize("NFC", text)
    for old, new in {"“": '"', "”": '"', "‘": "'", "’": "'", "—": " -- ", "–": "-", "…": "...", "\u00a0": " "}.items():
        text = text.replace(old, new)
    text = re.sub(r"(?<!\w)_|_(?!\w)", "", text).replace("`", "'")
    text = re.sub(r"\s*\[sic\]", "", text)
    return re.sub(r"\s+", " ", text).strip()


def sentences(text: str) -> list[str]:
    """Split after . ? ! where a capital or a quote follows; good enough to drop one sentence."""
    return re.split(r"(?<=[.?!])\s+(?=[\"'(A-Z])", text)


def shorten(text: str, limit: int = 320) -> str:
    """Whole sentences up to about ``limit`` characters, at least one; an unfinished last sentence is dropped."""
    kept: list[str] = []
    for sentence in sentences(text):
        if not re.search(r"[.?!][\"')]*$", sentence) or (kept and len(" ".join([*kept, sentence])) > limit):
            break
        kept.append(sentence)
    return " ".join(kept)


# --- The Devil's Dictionary -------------------------------------------------------------------------------------------

DEVIL_HEAD = re.compile(r"^(?P<word>[A-Z][A-Z' .-]*?)(?:, (?P<pos>(?:[a-z]{1,4}\.)+(?: and n\.)?)|\.)(?=\s|$)")
DEVIL_POS = {"n": "noun", "adj": "adjective", "adv": "adverb", "v": "verb", "pro": "pronoun", "pron": "pronoun"}


def devils_dictionary(names: set[str]) -> Iterator[Entry]:
    """Headword, part of speech and the prose of the definition; verse, and what follows it, is left out.

    ``names`` are the words that WordNet writes with a capital only.
    """
    text = read_package("dict-devil")
    blocks = text[text.index("ABASEMENT, n.") :].split("\n\n")
    for block in blocks:
        head = DEVIL_HEAD.match(block)
        if not head:
            continue
        prose = re.split(r"\n\s+", block[head.end() :])[0]
        definition = tidy(re.sub(r"(?<=\w)-\n(?=\w)", "-", prose).translate({ord("{"): None, ord("}"): None}))
        if definition.endswith(":"):  # the last sentence announces a verse or a list
            definition = " ".join(sentences(definition)[:-1])
        definition = re.sub(r"^\[[A-Z][^]]*\] ", "", definition)
        kind = (head["pos"] or "").split(".")[0]
        word = tidy(head["word"].lower())
        word = word.title() if word.title() in names else word
        pos = DEVIL_POS.get(kind, "verb" if kind in ("pp", "p") else "")
        yield {"word": word, "pos": pos, "definition": shorten(definition)}


# --- The Jargon File --------------------------------------------------------------------------------------------------

JARGON_KIND = {"n": "noun", "v": "verb", "vt": "verb", "vi": "verb", "adj": "adjective", "adv": "adverb"}
_LABEL = r"(?:n|v|vt|vi|adj|adv|excl|interj|prov|imp|quant|suff|pref|pl|obs|poss)\."
JARGON_POS = re.compile(rf"^(?:{_LABEL}(?:pl\.|,|/|\s|$)*)+")


def jargon() -> Iterator[Entry]:
    """Headword, part of speech and the first paragraph, without pronunciation, cross-reference braces and addresses."""
    for block in re.split(r"\n(?=\S)", read_package("dict-jargon")):
        lines = block.split("\n")
        word = tidy(lines[0])
        if len(lines) < 3 or word.startswith("00-") or lines[1].startswith("    "):
            continue
        about = re.sub(r"/[^/]*/|\[[^]]*\]|\([^)]*\)|[“\"][^”\"]*[”\"]", " ", lines[1])
        definition = ""
        for paragraph in re.split(r"\n\s*\n", "\n".join(lines[2:])):
            definition, kinds = _jargon_paragraph(paragraph, about)
            if definition:
                break
        yield {"word": word, "pos": JARGON_KIND[kinds[0]] if kinds else "", "definition": shorten(definition)}


def _jargon_paragraph(paragraph: str, about: str) -> tuple[str, list[str]]:
    """The prose of a paragraph and the parts of speech named in the head line or, failing that, at its start."""
    note = re.compile(r"^(?:\[[^]]*\][.,:]?\s*)+")
    text = re.sub(r"\{\s*([^}]*?)\s*\}", r"\1", tidy(re.sub(r"(?<=\w)-\n\s*(?=\w)", "-", paragraph)))
    text = note.sub("", re.sub(r"^1[.a]\.? ?", "", note.sub("", text)))
    labels = JARGON_POS.match(text)
    kinds = re.findall(r"\b(n|v[ti]?|adj|adv)\.", about) or re.findall(
        r"\b(n|v[ti]?|adj|adv)\.", labels[0] if labels else ""
    )
    text = note.sub("", text[labels.end() :] if labels else text)
    text = re.sub(r"^\((?:also|or|alt|pron|pl|var)[^()]*\)\s*", "", text)
    text = re.sub(r"\s*\([^()]*https?:[^()]*\)|\s*/[^/ ]*['@][^/]*/", "", text)
    text = " ".join(s for s in sentences(text) if "http:" not in s and "https:" not in s)
    text = re.sub(r" +([\"'])(?=[,.;:)])", r"\1", text)
    return re.sub(r"\s+([,.;:)])(?=\s|$)", r"\1", text).strip(), kinds


# --- WordNet ----------------------------------------------------------------------------------------------------------


def wordnet_synsets() -> Iterator[Entry]:
    """Every synset: its words, part of speech, gloss, examples and lexicographer file."""
    for part in ("noun", "verb", "adj", "adv"):
        text = read_package("wordnet-base", PACKAGES["wordnet-base"].with_name(f"data.{part}"))
        for line in text.split("\n"):
            if not line or line.startswith("  "):
                continue
            fields, gloss = line.split(" | ", 1)
            _, topic, kind, count, *rest = fields.split()
            words = [re.sub(r"\((?:a|p|ip)\)$", "", w).replace("_", " ") for w in rest[: 2 * int(count, 16) : 2]]
            definition = re.split(r';\s*"|\s"', gloss.strip())[0] if not gloss.startswith('"') else ""
            examples = re.findall(r'"([^"]+)"', gloss)
            yield {
                "words": words,
                "pos": POS[kind],
                "definition": tidy(definition).rstrip("; :"),
                "topic": TOPICS[int(topic)],
                "examples": [tidy(e) for e in examples],
            }
