"""The checks of lesson 13: the alpha of a file (A1), the permutation (B1), why the base answers (B2);
in the lesson itself the test of three prompts."""

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_edu.course.checks.candidates import without
from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.course.checks.tools import (
    between,
    close_number,
    is_number,
    is_tensor,
    known_slip,
    shape_or_type,
    with_note,
)
from lora_edu.serving.gguf import permuted

PREFIX = "base_model.model."


def gguf_alpha(candidate: Callable[[float, int, bool], Any], hint: int = 1) -> Report:
    """The alpha that a GGUF file needs for the scale as trained. Exercise A1 of lesson 13."""

    def ask(use_rslora: bool) -> None:
        r, alpha = random.choice([4, 9, 16, 25, 64]), random.choice([3.0, 6.0, 12.0, 20.0])
        scale = alpha / math.sqrt(r) if use_rslora else alpha / r
        got, right = candidate(alpha, r, use_rslora), scale * r
        if is_number(got) and close_number(got, right):
            return
        given = f"lora_alpha={alpha}, r={r}, use_rslora={use_rslora}"
        if not is_number(got):
            raise Wrong(
                f"{given}: you return {got!r}, a {type(got).__name__}",
                "Which number is written into the file?",
                "Return one number: the scale as trained times r.",
            )
        slips = [
            (scale, "that is the scale itself"),
            (alpha, "that is lora_alpha as it stands, as the converter writes it"),
            (alpha / math.sqrt(r), "that is the scale of rsLoRA"),
            (alpha * r, "that is lora_alpha times r"),
            (alpha * math.sqrt(r), "that is right for rsLoRA only"),
            (scale * math.sqrt(r), "that is the scale times √r"),
        ]
        note = known_slip(got, slips)
        raise Wrong(
            with_note(f"{given}: with {got:.4g} llama.cpp's scale is {got / r:.4g}, and it was {scale:.4g}", note),
            "llama.cpp computes alpha / r. What must alpha be, so that this is the scale as trained?",
            "The scale is lora_alpha / √r with rsLoRA and lora_alpha / r without; return it times r.",
        )

    steps = [("without rsLoRA", lambda: ask(False)), ("with rsLoRA", lambda: ask(True))]
    return run_steps("the alpha of a GGUF file", steps, hint)


@without(
    "lora_edu.serving.gguf",
    symptom="your function calls the library's {name}, which is what you are to write",
    question="Which row of a head goes where?",
    fix="Move the rows yourself: reshape, swap two axes, reshape back; or build the list of row numbers.",
)
def llama_rows(candidate: Callable[[Tensor, int], Any], hint: int = 1) -> Report:
    """The rows of q or k in llama.cpp's order. Exercise B1 of lesson 13."""
    fix = (
        "For each head of width d: rows 0, d/2, 1, d/2 + 1, … in this order, as in "
        "rows.reshape(heads, 2, d // 2, …).swapaxes(1, 2).reshape(rows.shape)."
    )

    def ask(rows: Tensor, heads: int) -> Tensor:
        got = candidate(rows.clone(), heads)
        if not is_tensor(got, rows.shape):
            raise Wrong(
                f"for rows of shape {tuple(rows.shape)} and {heads} heads you return {shape_or_type(got)}",
                "Rows change places, and nothing else. What shape has the result?",
                "End with .reshape(rows.shape).",
            )
        return got

    def need(rows: Tensor, heads: int) -> None:
        got = ask(rows, heads)
        if torch.equal(got, permuted(rows, heads)):
            return
        width = len(rows) // heads
        halves = rows.reshape(heads, 2, width // 2, *rows.shape[1:])
        slips = [
            (rows, "nothing has moved"),
            (permuted(rows, 1), "the rows were interleaved across heads, as if there were one"),
            (rows.reshape(heads, width // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape),
             "that is the way back, from llama.cpp's order to that of transformers"),
            (halves.flip(1).swapaxes(1, 2).reshape(rows.shape), "the second of each pair comes first"),
            (halves.flip(1).reshape(rows.shape), "the halves of each head have changed places"),
        ]  # fmt: skip
        order = [int((rows == row).flatten(1).all(1).nonzero()[0]) for row in got] if rows.ndim > 1 else []
        note = known_slip(got, slips, torch.equal, f"your first rows are {order[:width]}" if order else "")
        raise Wrong(
            with_note(f"with {heads} heads of width {width} the rows are not in llama.cpp's order", note),
            f"In a head of width {width}, row 0 and row {width // 2} are turned together. Where must they stand?",
            fix,
        )

    def one_head() -> None:
        need(torch.randn(2 * between(3, 6), between(3, 5)), 1)

    def heads() -> None:
        number = between(2, 4)
        need(torch.randn(number * 2 * between(3, 5), between(3, 5)), number)

    def bias() -> None:
        number = between(2, 3)
        need(torch.randn(number * 2 * between(3, 5)), number)

    def untouched() -> None:
        rows = torch.randn(12, 3)
        given = rows.clone()
        candidate(given, 2)
        if not torch.equal(given, rows):
            raise Wrong(
                "the tensor that you were given has changed",
                "Does a line of yours write into rows?",
                "Return a new tensor: the adapter in memory goes on being used.",
            )

    def update() -> None:
        number, r, inputs = between(2, 4), between(2, 3), between(4, 6)
        b, a = torch.randn(number * 6, r).double(), torch.randn(r, inputs).double()
        if not torch.allclose(ask(b, number) @ a, permuted(b @ a, number)):
            raise Wrong(
                "permuting B does not permute the rows of B A",
                "Does your function move rows as a whole?",
                fix,
            )

    steps = [
        ("one head: halves become neighbours", one_head),
        ("several heads, each for itself", heads),
        ("a bias, which has one dimension", bias),
        ("the tensor that was given stays as it was", untouched),
        ("B permuted is B A permuted", update),
    ]
    return run_steps("rows in llama.cpp's order", steps, hint)


def drawn_case(**changed: Any) -> dict[str, Any]:
    """A server that answers with its adapter, and what is changed in it."""
    layers = random.sample(range(9), 3)
    modules = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in layers for part in "qv"]
    tensors = {}
    for name in modules[:4]:
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(2, 5)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(6, 2)
    case = {"modules": modules, "adapters": {"devil": {"lora_alpha": 8, "tensors": tensors}}}
    return {**case, "request": {"model": "devil", "scale": 1.0}, **changed}


def with_tensors(change: Callable[[str, Tensor], tuple[str, Tensor]], **fields: Any) -> dict[str, Any]:
    """The case with each key and tensor changed, and with other fields of the adapter."""
    case = drawn_case()
    tensors = dict(change(key, tensor) for key, tensor in case["adapters"]["devil"]["tensors"].items())
    case["adapters"]["devil"] |= {"tensors": tensors, **fields}
    return case


def zeroed(end: str, key: str, tensor: Tensor) -> tuple[str, Tensor]:
    """The tensor, zero if its key ends so."""
    return key, torch.zeros_like(tensor) if key.endswith(end) else tensor


def why_base(candidate: Callable[[dict[str, Any]], Any], hint: int = 1) -> Report:
    """Why a server answers with its base. Exercise B2 of lesson 13."""
    causes = ("request", "scale", "names", "values", "adapter")

    def need(case: dict[str, Any], right: str, what: str, fix: str) -> None:
        got = candidate(case)
        if got not in causes:
            raise Wrong(
                f"you return {got!r}",
                "Which five answers are there?",
                f"Return one of {', '.join(map(repr, causes))}.",
            )
        if got != right:
            raise Wrong(f"{what}: you say {got!r}", "Which number or name would you print to see it?", fix)

    def fine() -> None:
        need(drawn_case(), "adapter", "a server whose adapter acts", "Only if nothing is wrong return 'adapter'.")
        case = with_tensors(lambda key, tensor: (key, -tensor), lora_alpha=-8)
        need(case, "adapter", "a negative lora_alpha", "Compare with zero: a negative scale acts.")

    def request() -> None:
        for model in ("base", "Devil"):
            case = drawn_case(request={"model": model, "scale": 1.0})
            said = f"a request for {model!r} where the adapter is called 'devil'"
            need(case, "request", said, "Look request['model'] up among the adapters first.")

    def scale() -> None:
        zero = drawn_case(request={"model": "devil", "scale": 0.0})
        fix = "The scale is request['scale'] · lora_alpha / r: it is zero if either of the first two is."
        need(zero, "scale", "a request with the scale 0", fix)
        need(with_tensors(lambda key, tensor: (key, tensor), lora_alpha=0), "scale", "lora_alpha = 0", fix)

    def names() -> None:
        fix = f"Take {PREFIX!r} and the end off each key, and look the rest up in case['modules']."
        inner = with_tensors(lambda key, tensor: (key.replace(PREFIX, f"{PREFIX}language_model."), tensor))
        need(inner, "names", "keys that hold another prefix than the modules", fix)
        bare = with_tensors(lambda key, tensor: (key.removeprefix(PREFIX), tensor))
        need(bare, "names", f"keys without {PREFIX!r}", fix)

    def values() -> None:
        fix = "Compute B @ A of each module that is there; if all are zero, return 'values'."
        for factor in "AB":
            end = f".lora_{factor}.weight"
            need(with_tensors(partial(zeroed, end)), "values", f"an adapter whose {factor} is all zero", fix)
        keep = {"A": torch.tensor([[1.0], [0.0]]), "B": torch.tensor([1.0, 0.0]).flip(0)}
        apart = with_tensors(lambda key, tensor: (key, tensor * keep["A" if ".lora_A." in key else "B"]))
        need(apart, "values", "A and B that are not zero, with a product that is", fix)

    def some() -> None:
        half = with_tensors(lambda key, tensor: (key, tensor))
        half["modules"] = half["modules"][1:]
        need(half, "adapter", "one adapted module that the model lacks, and three that it has",
             "It is enough that one module of the model gets an update that is not zero.")  # fmt: skip
        dead = with_tensors(lambda key, tensor: (key, tensor))
        first = dead["modules"][0]
        dead["modules"] = dead["modules"][:1]
        dead["adapters"]["devil"]["tensors"][f"{PREFIX}{first}.lora_B.weight"].zero_()
        need(dead, "values", "one module that is there, with a B of zero, and three that are not",
             "Look at the values of those modules only that the model has.")  # fmt: skip

    steps = [
        ("an adapter that acts", fine),
        ("the request names no adapter", request),
        ("the scale is zero", scale),
        ("no key names a module of the model", names),
        ("the update is zero", values),
        ("some modules fit and some do not", some),
    ]
    return run_steps("why the base answers", steps, hint)


def served_verdict(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """*Your turn* in lesson 13: ``candidate(ask, base, adapted, prompts)`` says whose answers a server gives."""

    def case(whose: str) -> tuple[Callable[[str], str], list[str], list[str], list[str]]:
        """A server that answers as the letters say: a(dapter), b(ase), x (another); capitals where the two agree."""
        prompts = [f"prompt {number}" for number in random.sample(range(100), len(whose))]
        base = [f"the base on {prompt}" for prompt in prompts]
        adapted = [
            one if letter.isupper() else f"the adapter on {prompt}"
            for letter, one, prompt in zip(whose, base, prompts, strict=True)
        ]
        said = {"a": adapted, "b": base, "x": [f"something else on {prompt}" for prompt in prompts]}
        served = {prompt: said[whose[place].lower()][place] for place, prompt in enumerate(prompts)}
        return served.__getitem__, base, adapted, prompts

    def need(whose: Sequence[str], right: str, what: str, question: str, fix: str) -> None:
        for letters in whose:
            got = candidate(*case(letters))
            if got != right:
                raise Wrong(f"{what}: you return {got!r}, expected {right!r}", question, fix)

    def plain(letter: str, right: str) -> None:
        need([letter * between(3, 5)], right, f"every prompt gets the {right}'s text",
             "With what is each text compared?",
             "Compare what ask(prompt) gives with the text at the same place in both lists.")  # fmt: skip

    def mixed() -> None:
        need(["xxx", "aax", "xaa", "bxb"], "neither", "some answers are neither text", "What if a text equals none?",
             "A third text anywhere makes it 'neither'.")  # fmt: skip
        need(["aab", "baa", "aba"], "neither", "some answers are the adapter's and some the base's",
             "Is one right answer enough, or the first, or the last?", "Collect what every prompt says.")  # fmt: skip

    def silent() -> None:
        need(["aaB", "Baa"], "adapter", "base and adapter agree on one prompt, and the others get the adapter's text",
             "What does a prompt tell to which both give the same text?", "Leave it out.")  # fmt: skip
        need(["bbB", "Abb"], "base", "base and adapter agree on one prompt, and the others get the base's text",
             "What does a prompt tell to which both give the same text?", "Leave it out.")  # fmt: skip
        need(["aaX"], "neither", "base and adapter agree on one prompt, and the server says something else there",
             "May a prompt be left out at which the server says what neither would?",
             "Leave a prompt out only if all three texts are equal.")  # fmt: skip

    def nothing() -> None:
        try:
            got = candidate(*case("BBB"))
        except ValueError:
            return
        raise Wrong(
            f"base and adapter agree on every prompt, and you return {got!r}",
            "What has been proven, if no prompt could tell?",
            "Raise ValueError where nothing is left to compare.",
        )

    steps = [
        ("the adapter's answers", lambda: plain("a", "adapter")),
        ("the base's answers", lambda: plain("b", "base")),
        ("anything else is neither", mixed),
        ("prompts on which all agree tell nothing", silent),
        ("if none tells, ValueError", nothing),
    ]
    return run_steps("whose answers a server gives", steps, hint)
