"""Checks of lesson 04: name matching (A1) and a verdict over seeds (C1)."""

import random
from collections.abc import Callable, Iterable, Sequence

from lora_edu.course.checks.report import Report, Wrong, run_steps


def name_matching(candidate: Callable[[str, Sequence[str]], bool], hint: int = 1) -> Report:
    """``candidate(name, targets)``: is this module meant by a list of targets? Exercise A1 of lesson 04."""

    def expect(cases: Iterable[tuple[str, list[str]]], right: bool, question: str, fix: str) -> None:
        for name, targets in cases:
            got = candidate(name, targets)
            if bool(got) is not right:
                said = "means" if right else "does not mean"
                raise Wrong(f"{targets} {said} {name!r}, and you return {got!r}", question, fix)

    i = random.randint(0, 9)
    whole = 'Compare whole segments: name == target or name.endswith("." + target).'

    def endings() -> None:
        cases = [(f"model.layers.{i}.self_attn.q_proj", ["q_proj"]), (f"model.layers.{i}.mlp.up_proj", ["up_proj"])]
        expect(cases, True, "From which side is a name read?", whole)

    def several_segments() -> None:
        expect(
            [(f"model.layers.{i}.self_attn.q_proj", ["self_attn.q_proj"]), (f"layers.{i}.fc", [f"{i}.fc"])],
            True,
            "A target may itself hold dots. Do you compare it with one segment only?",
            whole,
        )

    def top_level() -> None:
        cases = [("q_proj", ["q_proj"]), ("lm_head", ["lm_head"]), (f"layers.{i}.fc", [f"layers.{i}.fc"])]
        expect(cases, True, "What stands before a name that is given in full? A dot?", whole)

    def parts_of_words() -> None:
        cases = [(f"layers.{i}.eq_proj", ["q_proj"]), (f"layers.{i}.post_attention_layernorm", ["attention"])]
        cases += [(f"layers.{i}.q_proj_norm", ["q_proj"]), (f"layers.1{i}.fc", [f"{i}.fc"])]
        expect(cases, False, "May a target begin or end in the middle of a segment?", whole)

    def children() -> None:
        cases = [(f"layers.{i}.self_attn.q_proj.base", ["q_proj"]), (f"layers.{i}.self_attn.q_proj", ["self_attn"])]
        expect(
            cases,
            False,
            "Is the layer inside a match also a match?",
            "The target must be the end of the name. " + whole,
        )

    def any_of_them() -> None:
        targets = ["v_proj", "q_proj", "down_proj"]
        expect([(f"layers.{i}.{target}", targets) for target in targets], True, "One fit is enough.", "Use any(…).")
        expect([(f"layers.{i}.k_proj", targets)], False, "None of the targets is k_proj.", "Use any(…).")

    def no_pattern() -> None:
        cases = [(f"layers.{i}.q_proj", ["q.proj"]), (f"layers.{i}.q_proj", [".*"])]
        expect(cases, False, "Is an entry of a list a regular expression?", "Compare text, not patterns. " + whole)

    def oracle() -> None:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        words = ["q_proj", "v_proj", "eq_proj", "proj", "self_attn", "layers", "0", "1", "fc"]
        for _ in range(300):
            name = ".".join(random.choices(words, k=random.randint(1, 4)))
            targets = [".".join(random.choices(words, k=random.randint(1, 2))) for _ in range(random.randint(1, 2))]
            right = bool(check_target_module_exists(LoraConfig(target_modules=targets), name))
            expect([(name, targets)], right, "PEFT answers differently. Which rule above does this name test?", whole)

    steps = [
        ("a target fits the last segment of a name", endings),
        ("a target may span several segments", several_segments),
        ("a name given in full matches itself, also at the top of the model", top_level),
        ("parts of words do not match", parts_of_words),
        ("what is inside a match, or around it, does not match", children),
        ("one fitting target is enough", any_of_them),
        ("targets in a list are no patterns", no_pattern),
        ("300 random names: as PEFT", oracle),
    ]
    return run_steps("name matching", steps, hint)


def seed_verdict(candidate: Callable[[Sequence[float], Sequence[float]], str], hint: int = 1) -> Report:
    """``candidate(a, b)``: "a", "b" or "not evidence", from the losses of several seeds. Exercise C1 of lesson 04."""

    def expect(a: list[float], b: list[float], right: str, question: str, fix: str) -> None:
        got = candidate(a, b)
        if got != right:
            raise Wrong(f"for {a} against {b} you return {got!r}, expected {right!r}", question, fix)

    ranges = "a wins if max(a) < min(b), b wins if max(b) < min(a); everything else is not evidence."

    def apart() -> None:
        low = round(random.uniform(4, 4.2), 2)
        a, b = [low + 0.02, low, low + 0.01], [low + 0.3, low + 0.32, low + 0.31]
        expect(a, b, "a", "Which loss is the better one?", "The lower loss wins. " + ranges)
        expect(b, a, "b", "Does your rule also hold with the two exchanged?", ranges)

    def overlap() -> None:
        question = "Does every seed of one beat every seed of the other?"
        expect([4.20, 4.26, 4.22], [4.25, 4.31, 4.29], "not evidence", question, ranges)
        expect([4.31, 4.25, 4.29], [4.26, 4.20, 4.22], "not evidence", question, ranges)

    def inside() -> None:
        question = "One range lies inside the other. Does a lower mean settle it?"
        expect([4.10, 4.50, 4.11], [4.30, 4.31, 4.32], "not evidence", question, ranges)

    def touching() -> None:
        expect([4.2, 4.3], [4.3, 4.4], "not evidence", "Two seeds have the same loss. Who won there?", ranges)

    def lonely() -> None:
        expect(
            [4.2], [4.9], "not evidence", "How large is the spread of one seed?", "One seed has no spread: " + ranges
        )

    steps = [
        ("ranges that lie apart decide", apart),
        ("ranges that overlap do not", overlap),
        ("a lower mean alone does not", inside),
        ("ranges that touch do not", touching),
        ("a single seed does not", lonely),
    ]
    return run_steps("verdict over seeds", steps, hint)
