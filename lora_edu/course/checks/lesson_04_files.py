"""Check of lesson 04: saving and loading an adapter (B2)."""

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_edu.core.config import LoraConfig
from lora_edu.core.inject import inject
from lora_edu.core.layer import LoRALinear
from lora_edu.core.peft_io import save_adapter
from lora_edu.course.checks.report import Report, Wrong, run_steps

PREFIX = "base_model.model."
TARGETS = ["q_proj", "down_proj"]


def draw_llama() -> nn.Module:
    """A very small Llama with random weights; called twice under one seed it gives the same one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=23, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def pair(r: int = 3) -> tuple[nn.Module, nn.Module]:
    """The same base twice: with a trained-looking adapter, and with a fresh one of the same kind."""
    seed = random.randrange(2**31)
    models = []
    for trained in (True, False):
        torch.manual_seed(seed)
        model = draw_llama()
        inject(model, LoraConfig(r=r, lora_alpha=7, target_modules=TARGETS))
        for layer in lora_layers(model).values():
            if trained:
                nn.init.normal_(layer.lora_A)
                nn.init.normal_(layer.lora_B)
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


def save_and_load(save: Callable[[Any, Path], Any], load: Callable[[Any, Path], Any], hint: int = 1) -> Report:
    """``save(model, file)`` and ``load(model, file)`` for an adapter alone. Exercise B2 of lesson 04."""

    def in_folder(step: Callable[[Path], None]) -> Callable[[], None]:
        def run() -> None:
            with tempfile.TemporaryDirectory() as folder:
                step(Path(folder) / "adapter_model.safetensors")

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
            before = {name: p.detach().clone() for name, p in fresh.named_parameters()}
            try:
                load(fresh, file)
            except NotImplementedError:
                raise
            except Exception:
                if all(torch.equal(p, before[name]) for name, p in fresh.named_parameters()):
                    return
                raise Wrong(
                    f"a file {what} is refused, but by then half of it had been loaded",
                    "When do you check, and when do you copy?",
                    "Check every key and shape first, then copy.",
                ) from None
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
        mine = draw_llama()
        inject(mine, LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS))
        save_adapter(model, file.parent)  # for its config; the weights come from the learner
        file.unlink()
        save(model, file)
        load(mine, file)
        torch.manual_seed(seed)
        theirs = PeftModel.from_pretrained(draw_llama(), str(file.parent)).eval()
        ids = torch.randint(23, (2, 5))
        with torch.no_grad():
            if not torch.allclose(theirs(ids).logits, mine(ids).logits, rtol=1e-5, atol=1e-5):
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
