"""The checks of lesson 04: names (in the lesson), what trains (A1), injection by hand (B1), saving and loading (B2),
a verdict over seeds (C1).
"""

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_edu.core.config import LoraConfig
from lora_edu.core.inject import count_parameters, inject
from lora_edu.core.layer import LoRALinear
from lora_edu.core.peft_io import PREFIX, WEIGHTS_FILE, save_adapter
from lora_edu.course.checks.candidates import without
from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.course.checks.tools import changed, close, randomise, small_llama, temporary_folder, trainable, values_of

TARGETS = ["q_proj", "down_proj"]


@without(
    "lora_edu.core.matching", "peft",
    symptom="you call {name}, which holds the rule that you are asked to write",
    question="From which side is a name read, and where may a target begin?",
    fix='any(name == target or name.endswith("." + target) for target in targets)',
)  # fmt: skip
def name_matching(candidate: Callable[[str, Sequence[str]], bool], hint: int = 1) -> Report:
    """``candidate(name, targets)``: is this module meant by a list of targets? *Your turn* in lesson 04."""

    def expect(cases: Iterable[tuple[str, list[str]]], right: bool, question: str, fix: str) -> None:
        i = random.randint(0, 9)  # stands in the names as {i}
        for name, targets in cases:
            name, targets = name.format(i=i), [target.format(i=i) for target in targets]
            got = candidate(name, list(targets))
            if bool(got) is not right:
                said = "means" if right else "does not mean"
                raise Wrong(f"{targets} {said} {name!r}, and you return {got!r}", question, fix)

    whole = 'Compare whole segments: name == target or name.endswith("." + target).'

    def endings() -> None:
        cases = [("model.layers.{i}.self_attn.q_proj", ["q_proj"]), ("model.layers.{i}.mlp.up_proj", ["up_proj"])]
        expect(cases, True, "From which side is a name read?", whole)

    def several_segments() -> None:
        expect(
            [("model.layers.{i}.self_attn.q_proj", ["self_attn.q_proj"]), ("layers.{i}.fc", ["{i}.fc"])],
            True,
            "A target may itself hold dots. Do you compare it with one segment only?",
            whole,
        )

    def top_level() -> None:
        cases = [("q_proj", ["q_proj"]), ("lm_head", ["lm_head"]), ("layers.{i}.fc", ["layers.{i}.fc"])]
        expect(cases, True, "What stands before a name that is given in full? A dot?", whole)

    def parts_of_words() -> None:
        cases = [("layers.{i}.eq_proj", ["q_proj"]), ("layers.{i}.post_attention_layernorm", ["attention"])]
        cases += [("layers.{i}.q_proj_norm", ["q_proj"]), ("layers.1{i}.fc", ["{i}.fc"])]
        expect(cases, False, "May a target begin or end in the middle of a segment?", whole)

    def children() -> None:
        cases = [("layers.{i}.self_attn.q_proj.base", ["q_proj"]), ("layers.{i}.self_attn.q_proj", ["self_attn"])]
        expect(
            cases,
            False,
            "Is the layer inside a match also a match?",
            "The target must be the end of the name. " + whole,
        )

    def any_of_them() -> None:
        targets = ["v_proj", "q_proj", "down_proj"]
        expect([(f"layers.{{i}}.{target}", targets) for target in targets], True, "One fit is enough.", "Use any(…).")
        expect([("layers.{i}.k_proj", targets)], False, "None of the targets is k_proj.", "Use any(…).")

    def no_pattern() -> None:
        cases = [("layers.{i}.q_proj", ["q.proj"]), ("layers.{i}.q_proj", [".*"])]
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


class Block(nn.Module):
    """A piece of a model with a name that only looks like a target (eq_proj) and a norm that sounds like one."""

    def __init__(self, width: int, wide: int):
        super().__init__()
        self.q_proj, self.eq_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj_norm = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(width, wide), "down_proj": nn.Linear(wide, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.q_proj_norm(self.q_proj(x) + self.eq_proj(x))
        return self.mlp["down_proj"](torch.tanh(self.mlp["up_proj"](x)))


def draw_model() -> nn.Module:
    """An embedding, blocks in a list, and at the top of the model a linear layer and a head."""
    width, wide = random.randint(5, 9), random.randint(10, 14)
    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(11, width))
    model.add_module("layers", nn.Sequential(*(Block(width, wide) for _ in range(random.randint(2, 3)))))
    model.add_module("q_proj", nn.Linear(width, width))
    model.add_module("head", nn.Linear(width, 11))
    return model.double()


def adapted(model: nn.Module) -> list[str]:
    """Names of the LoRA layers in a model."""
    return [name for name, module in model.named_modules() if type(module) is LoRALinear]


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


@without(
    "lora_edu.core.inject", "peft",
    symptom="you call {name}: the library injects, not your function",
    question="What has to happen to one layer, and to the parameters of all others?",
    fix="setattr(parent, attribute, LoRALinear(layer, r, lora_alpha)) for each match; then freeze by owner.",
)  # fmt: skip
def hand_injection(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """``candidate(model, targets, r, lora_alpha)`` injects LoRA by hand. Exercise B1 of lesson 04."""
    targets = ["q_proj", "up_proj"]

    def right_names(model: nn.Module, wanted: Sequence[str]) -> list[str]:
        ends = tuple("." + target for target in wanted)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return [name for name in linear if name in wanted or name.endswith(ends)]

    def replaces() -> None:
        model = draw_model()
        expected = right_names(model, targets)
        candidate(model, targets, 2, 6)
        found = adapted(model)
        if not found:
            raise Wrong(
                "after your call the model still holds no LoRALinear",
                "Did you change this model, or a copy of it? And is the new layer put back under its name?",
                "setattr(parent, attribute, LoRALinear(layer, r, lora_alpha)), in the model that came in.",
            )
        if missed := [name for name in expected if name not in found]:
            raise Wrong(
                f"not adapted: {some(missed)}",
                "Do you reach layers at every depth, inside lists and dictionaries, and at the top of the model?",
                "Walk model.named_modules(); the parent is model.get_submodule(name.rpartition('.')[0]).",
            )
        if extra := [name for name in found if name not in expected]:
            raise Wrong(
                f"adapted, but no target: {some(extra)}",
                "Which rule decides whether a name is meant? See *Your turn* in the lesson.",
                "Match whole segments: lora_edu.core.matching.matches_names(targets, name).",
            )

    def returns_names() -> None:
        model = draw_model()
        expected, got = right_names(model, targets), candidate(model, targets, 2, 6)
        if not isinstance(got, list) or [str(name) for name in got] != expected:
            shown = f"{len(got)} entries, the first {got[0]!r}" if isinstance(got, list) and got else repr(got)
            raise Wrong(
                f"you return {shown}; expected a list of {len(expected)} full names, the first {expected[0]!r}",
                "By which name would a reader find the layer in this model?",
                "Collect the full names of named_modules() in their order, and return that list.",
            )

    def settings() -> None:
        model, r, alpha = draw_model(), random.randint(2, 4), random.randint(5, 9)
        candidate(model, targets, r, alpha)
        layer: Any = model.get_submodule("q_proj")
        if (layer.r, layer.lora_alpha) != (r, alpha):
            raise Wrong(
                f"asked for r={r}, lora_alpha={alpha}; the layers have r={layer.r}, lora_alpha={layer.lora_alpha}",
                "Are both numbers passed on to LoRALinear?",
                "LoRALinear(layer, r=r, lora_alpha=lora_alpha)",
            )

    def starts_at_base() -> None:
        model, ids = draw_model(), torch.randint(11, (3, 5))
        before, weights = model(ids), {id(parameter) for parameter in model.parameters()}
        candidate(model, targets, 2, 6)
        same = {id(p) for name, p in model.named_parameters() if "lora_" not in name} == weights
        if not same or not torch.equal(model(ids), before):
            raise Wrong(
                "the fresh adapter changes the model's output, or its pretrained weights are new tensors",
                "Which layer did you give to LoRALinear: the model's own, or a new one?",
                "Wrap the layer that stands there; LoRALinear keeps it as .base.",
            )

    def frozen_factors(model: nn.Module) -> list[str]:
        return [name for name, p in model.named_parameters() if "lora_" in name and not p.requires_grad]

    def freezes() -> None:
        model = draw_model()
        candidate(model, targets, 2, 6)
        trains = trainable(model)
        if loose := [name for name in trains if "lora_" not in name]:
            n, total = count_parameters(model)
            raise Wrong(
                f"{n} of {total} numbers train, among them {some(loose)}",
                "LoRALinear freezes the layer that it wraps. Who freezes all the others?",
                "Freeze the whole model, then let only the parameters of LoRALinear modules train.",
            )
        if dead := frozen_factors(model):
            raise Wrong(
                f"frozen as well: {some(dead)}",
                "In which order do you freeze and wrap?",
                "Freeze first and wrap then, or set requires_grad of lora_A and lora_B at the end.",
            )

    def once() -> None:
        model, ids = draw_model(), torch.randint(11, (2, 4))
        candidate(model, targets, 2, 6)
        for name in adapted(model):
            layer: Any = model.get_submodule(name)
            nn.init.normal_(layer.lora_B)
        before, names, modules = model(ids), adapted(model), len(list(model.modules()))
        again = candidate(model, targets, 2, 6)
        if adapted(model) != names or len(list(model.modules())) != modules:
            raise Wrong(
                f"after a second call there are {len(adapted(model))} LoRA layers, {len(names)} before: "
                "a layer was wrapped twice",
                "After the first call a plain nn.Linear stands inside each LoRALinear. What are the two called now?",
                "Wrap only modules that are an nn.Linear, and only if their own full name matches.",
            )
        if again != [] or not torch.equal(model(ids), before):
            raise Wrong(
                f"a second call found nothing to wrap and returned {again!r}; expected [] and an unchanged output",
                "What did this call replace?",
                "Return the names that this call replaced: an empty list.",
            )

    def adds() -> None:
        model = draw_model()
        first = candidate(model, ["q_proj"], 2, 6)
        second = candidate(model, ["down_proj"], 3, 6)
        frozen = frozen_factors(model)
        if sorted(adapted(model)) != sorted([*first, *second]) or frozen:
            raise Wrong(
                f"a second call with other targets stops the first adapter from training: {some(frozen)}"
                if frozen
                else "after a second call with other targets, the adapted layers are not those of both calls",
                "Freezing everything also freezes the A and B of an earlier call.",
                "Decide by owner: a parameter trains if its module is a LoRALinear.",
            )

    def oracle() -> None:
        import peft

        model = draw_model()
        reference = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=3, target_modules=targets))
        candidate(model, targets, 3, 8)
        mine, _ = count_parameters(model)
        right, _ = reference.get_nb_trainable_parameters()
        if mine != right:
            raise Wrong(
                f"PEFT trains {right:,} parameters of this model, yours {mine:,}",
                "Print name and size of everything that trains, in both models.",
                "Compare [n for n, p in model.named_parameters() if p.requires_grad] to lora_edu.core.inject's.",
            )

    steps = [
        ("every target is replaced, and nothing else", replaces),
        ("the names of the replaced layers come back", returns_names),
        ("r and lora_alpha reach the layers", settings),
        ("the model starts where it was", starts_at_base),
        ("only A and B train", freezes),
        ("a second call wraps nothing twice", once),
        ("a second call with other targets adds to the first", adds),
        ("as many trainable parameters as PEFT", oracle),
    ]
    return run_steps("injection", steps, hint)


def pair(r: int = 3) -> tuple[nn.Module, nn.Module]:
    """The same base twice: with a trained-looking adapter, and with a fresh one of the same kind."""
    seed = random.randrange(2**31)
    models = []
    for trained in (True, False):
        torch.manual_seed(seed)
        model = small_llama()
        inject(model, LoraConfig(r=r, lora_alpha=7, target_modules=TARGETS))
        for layer in lora_layers(model).values():
            if trained:
                randomise(layer)
        models.append(model)
    return models[0], models[1]


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """LoRA layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def right_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What belongs into the file, under PEFT's keys."""
    return {
        f"{PREFIX}{name}.{key}": tensor.detach().clone()
        for name, layer in lora_layers(model).items()
        for key, tensor in layer.to_file().items()
    }


@without(
    "lora_edu.core.peft_io", "peft",
    symptom="you call {name}: the library handles the file, not your functions",
    question="Which tensors make up the adapter, and under which keys does PEFT look for them?",
    fix="Build {key: parameter} from the model's LoRALinear layers; save_file writes it, load_file reads it.",
)  # fmt: skip
def save_and_load(save: Callable[[Any, Path], Any], load: Callable[[Any, Path], Any], hint: int = 1) -> Report:
    """``save(model, file)`` and ``load(model, file)`` for an adapter alone. Exercise B2 of lesson 04."""

    def in_folder(step: Callable[[Path], None]) -> Callable[[], None]:
        def run() -> None:
            with temporary_folder() as folder:
                step(folder / WEIGHTS_FILE)

        return run

    def read_back(model: nn.Module, file: Path) -> dict[str, Tensor]:
        save(model, file)
        if not file.is_file():
            raise Wrong("no file was written", "Which path was given to you?", "save_file(tensors, file)")
        try:
            return load_file(file)
        except SafetensorError:
            raise Wrong(
                "the file is no safetensors file",
                "Which library writes it? A pickle can run code when somebody opens it.",
                "from safetensors.torch import save_file",
            ) from None

    def only_adapter(file: Path) -> None:
        model, _ = pair()
        found, right = read_back(model, file), right_tensors(model)
        n, wanted = sum(t.numel() for t in found.values()), sum(t.numel() for t in right.values())
        strangers = [key for key in found if "lora_" not in key]
        if n != wanted:
            raise Wrong(
                f"the file holds {n:,} numbers, the adapter has {wanted:,}"
                + (f"; {strangers[0]!r} belongs to the base" if strangers else ""),
                "What of the model does another person not have yet?",
                "Write lora_A and lora_B of every LoRALinear, and nothing else.",
            )

    def keys(file: Path) -> None:
        model, _ = pair()
        found, right = read_back(model, file), right_tensors(model)
        if strange := sorted(found.keys() - right.keys()):
            raise Wrong(
                f"a key in the file is {strange[0]!r}; PEFT's for such a tensor is {min(right)!r}",
                "What stands before the module's name, and what after lora_A?",
                'f"base_model.model.{name}.lora_A.weight"',
            )

    def values(file: Path) -> None:
        model, _ = pair()
        found = read_back(model, file)
        for key, tensor in right_tensors(model).items():
            if found[key].shape != tensor.shape or not torch.equal(found[key], tensor):
                raise Wrong(
                    f"{key!r} in the file differs from the model's tensor",
                    "Is it this layer's, is it transposed, is it rounded?",
                    "Store module.lora_A.detach() and module.lora_B.detach() as they are.",
                )

    def round_trip(file: Path) -> None:
        model, fresh = pair()
        save(model, file)
        parameters = [id(p) for p in fresh.parameters()]
        load(fresh, file)
        ids = torch.randint(23, (2, 5))
        with torch.no_grad():
            if not torch.equal(model(ids).logits, fresh(ids).logits):
                raise Wrong(
                    "after loading, the fresh model's logits are not those of the saved one",
                    "Does every tensor reach its layer? Compare lora_A and lora_B of one layer in both models.",
                    "Look up each key's module and copy the tensor into its parameter.",
                )
        if [id(p) for p in fresh.parameters()] != parameters:
            raise Wrong(
                "loading put new parameters into the model: an optimizer made before would train the old ones",
                "How does one write into a parameter that is there already?",
                "with torch.no_grad(): parameter.copy_(tensor)",
            )

    def refuses(change: Callable[[dict[str, Tensor]], None], what: str, question: str, fix: str, r: int = 3) -> Any:
        def step(file: Path) -> None:
            (model, _), (_, fresh) = pair(r), pair()
            tensors = right_tensors(model)
            change(tensors)
            save_file(tensors, file)
            before = values_of(fresh)
            try:
                load(fresh, file)
            except NotImplementedError:
                raise
            except Exception as error:
                if changed(fresh, before):
                    raise Wrong(
                        f"a file {what} is refused, but by then half of it had been loaded",
                        "When do you check, and when do you copy?",
                        "Check every key and shape first, then copy.",
                    ) from None
                if not isinstance(error, ValueError):
                    raise Wrong(
                        f"a file {what} raises {type(error).__name__}: {error!s:.80}; expected ValueError",
                        "Do you compare keys and shapes yourself, before PyTorch or a dictionary stumbles over them?",
                        fix,
                    ) from None
                return
            raise Wrong(f"a file {what} is loaded without a word", question, fix)

        return in_folder(step)

    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors[max(tensors)]

    def add(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(3, 12)

    def nothing(tensors: dict[str, Tensor]) -> None:
        pass

    def oracle(file: Path) -> None:
        from peft import PeftModel

        model, _ = pair()
        seed = random.randrange(2**31)
        torch.manual_seed(seed)
        mine = small_llama()
        inject(mine, LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS))
        save_adapter(model, file.parent)  # for its config; the weights come from the learner
        file.unlink()
        save(model, file)
        load(mine, file)
        torch.manual_seed(seed)
        theirs = PeftModel.from_pretrained(small_llama(), str(file.parent)).eval()
        ids = torch.randint(23, (2, 5))
        with torch.no_grad():
            if not close(mine(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5):
                raise Wrong(
                    "PEFT reads your file and gets other logits",
                    "Are A and B in the file the right way round?",
                    "A is (r, in), B is (out, r), under lora_A.weight and lora_B.weight.",
                )

    complete = "Raise ValueError unless the file's keys are exactly the model's."
    steps = [
        ("the file holds A and B of every layer, and nothing else", in_folder(only_adapter)),
        ("under PEFT's keys", in_folder(keys)),
        ("value for value", in_folder(values)),
        ("a fresh model gets the same logits, bit for bit", in_folder(round_trip)),
        ("a file with a tensor missing is refused",
         refuses(drop, "with a tensor missing", "What does strict=False hide?", complete)),
        ("a file with a foreign tensor is refused",
         refuses(add, "with a tensor of a layer that the model does not have", "Whose tensor is it?", complete)),
        ("a file of another rank is refused",
         refuses(nothing, "of rank 1 for a model of rank 3", "What does copy_ make of shapes (1, in) and (3, in)?",
                 "Compare the shapes too: copy_ broadcasts.", r=1)),
        ("PEFT reads your file and gets the same logits", in_folder(oracle)),
    ]  # fmt: skip
    return run_steps("save and load", steps, hint)


def verdict_of(a: Sequence[float], b: Sequence[float]) -> str:
    """The right verdict over the losses of some seeds."""
    if min(len(a), len(b)) < 2:
        return "not evidence"
    return "a" if max(a) < min(b) else "b" if max(b) < min(a) else "not evidence"


def seed_verdict(candidate: Callable[[Sequence[float], Sequence[float]], str], hint: int = 1) -> Report:
    """``candidate(a, b)``: "a", "b" or "not evidence", from the losses of several seeds. Exercise C1 of lesson 04."""

    def expect(a: list[float], b: list[float], question: str, fix: str) -> None:
        got = candidate(list(a), list(b))
        if got != (right := verdict_of(a, b)):
            raise Wrong(f"for {a} against {b} you return {got!r}, expected {right!r}", question, fix)

    ranges = "a wins if max(a) < min(b), b wins if max(b) < min(a); everything else is not evidence."

    def apart() -> None:
        low = round(random.uniform(4, 4.2), 2)
        a = [round(low + more, 2) for more in (0.02, 0, 0.01)]
        b = [round(low + more, 2) for more in (0.3, 0.32, 0.31)]
        fix = "The lower loss wins. " + ranges
        expect(a, b, "Which loss is the better one?", fix)
        expect(b, a, "Does your rule also hold with the two exchanged?", fix)

    def overlap() -> None:
        question = "Does every seed of one beat every seed of the other?"
        expect([4.20, 4.26, 4.22], [4.25, 4.31, 4.29], question, ranges)
        expect([4.31, 4.25, 4.29], [4.26, 4.20, 4.22], question, ranges)

    def inside() -> None:
        question = "One range lies inside the other. Does a lower mean settle it?"
        expect([4.10, 4.50, 4.11], [4.30, 4.31, 4.32], question, ranges)
        expect([4.30, 4.31, 4.32], [4.10, 4.50, 4.11], question, ranges)

    def touching() -> None:
        question = "Two seeds have the same loss. Who won there?"
        expect([4.2, 4.3], [4.3, 4.4], question, ranges)
        expect([4.3, 4.4], [4.2, 4.3], question, ranges)

    def lonely() -> None:
        for a, b in (([4.2], [4.9]), ([4.9], [4.2]), ([4.2], [4.9, 4.8]), ([4.9, 4.8], [4.2])):
            expect(a, b, "How large is the spread of one seed?", "One seed has no spread: " + ranges)

    def drawn() -> None:
        for _ in range(40):
            gap = random.choice([-0.1, -0.05, 0, 0.05, 0.1])
            a = [round(random.uniform(4.2, 4.25), 2) for _ in range(random.randint(1, 5))]
            b = [round(random.uniform(4.2, 4.25) + gap, 2) for _ in range(random.randint(1, 5))]
            expect(a, b, "Which of the points above do these losses test?", ranges)

    steps = [
        ("ranges that lie apart decide", apart),
        ("ranges that overlap do not", overlap),
        ("a lower mean alone does not", inside),
        ("ranges that touch do not", touching),
        ("a single seed does not", lonely),
        ("40 drawn pairs", drawn),
    ]
    return run_steps("verdict over seeds", steps, hint)


def loose_parameters(candidate: Callable[[nn.Module], Iterable[str]], hint: int = 1) -> Report:
    """``candidate(model)``: the names of what trains and is no A or B of a LoRA layer. Exercise A1 of lesson 04."""
    fix = (
        "[name for name, p in model.named_parameters() if p.requires_grad "
        'and name.rpartition(".")[2] not in ("lora_A", "lora_B")]'
    )

    def adapted_model() -> nn.Module:
        model = draw_model()
        inject(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
        return model

    def expect(model: nn.Module, question: str) -> None:
        right = [
            f"{name}.{key}"
            for name, module in model.named_modules()
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and not isinstance(module, LoRALinear)
        ]
        before, everything = trainable(model), {name for name, _ in model.named_parameters()}
        got = candidate(model)
        if isinstance(got, str) or not isinstance(got, Iterable):
            raise Wrong(f"you return {got!r}; expected a list of names", "Which parameters are they?", fix)
        names = list(got)
        if trainable(model) != before:
            raise Wrong("after your call other parameters train than before", "Do you only look?", fix)
        for name in names:
            if name not in everything:
                raise Wrong(f"you name {name!r}, and no parameter has this name", "What holds the full names?", fix)
            if name not in right:
                why = "it is the A or B of a LoRA layer" if name in before else "it does not train"
                raise Wrong(f"you name {name!r}, and {why}", "Which two things must hold for a name?", fix)
        if missed := [name for name in right if name not in names]:
            raise Wrong(f"not named, and it trains: {some(missed)}", question, fix)
        if len(names) != len(right):
            raise Wrong(f"you name {len(names)} parameters, some of them twice; expected {len(right)}", question, fix)

    def fresh() -> None:
        expect(adapted_model(), "")

    def head() -> None:
        model = adapted_model()
        model.get_submodule("head").requires_grad_(True)
        expect(model, "Do you look at the whole model, or at the adapted layers only?")

    def biases() -> None:
        model = adapted_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name.endswith(".bias"))
        expect(model, "A layer may have more than a weight. Which parameters of a LoRA layer belong to the base?")

    def inside() -> None:
        model = adapted_model()
        model.get_submodule("q_proj.base").requires_grad_(True)
        expect(model, "Inside a LoRA layer stands the pretrained layer. Do you leave out the whole LoRA layer?")

    def words() -> None:
        model = adapted_model()
        model.add_module("lora_notes", nn.Linear(3, 2))
        expect(model, "Does every name with lora in it belong to a LoRA layer? Which segment decides?")

    def published() -> None:
        model = draw_model()
        layers: Any = model.get_submodule("layers")
        for block in layers:
            block.q_proj = LoRALinear(block.q_proj, r=2)
        expect(model, "Nothing was frozen here but the wrapped layers.")

    steps = [
        ("after inject there is none", fresh),
        ("a head that trains is named", head),
        ("so are biases", biases),
        ("so is the pretrained weight inside a LoRA layer", inside),
        ("so is a layer that only sounds like LoRA", words),
        ("in the function that the lesson quotes, all that it does not wrap is named", published),
    ]
    return run_steps("what else trains", steps, hint)
