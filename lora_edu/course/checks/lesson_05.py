"""The checks of lesson 05: PEFT's numbers (A1), a model by targets (B1), a file (B2), budgets (C1)."""

import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, RobertaConfig

from lora_edu.core.matching import is_target
from lora_edu.core.peft_io import WEIGHTS_FILE
from lora_edu.counting import count_parameters, lora_parameters
from lora_edu.counting.meta import meta_model
from lora_edu.course.checks.candidates import without
from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.course.checks.tools import (
    close_number,
    dtype_name,
    is_number,
    is_whole,
    known_slip,
    need_refusal,
    need_several,
    need_whole,
    temporary_folder,
)


def need_count(value: Any) -> int:
    """The learner's number, if it is a whole one."""
    return need_whole(value, "Can there be half a parameter?", "Count with whole numbers: an int.")


def peft_numbers(candidate: Callable[[int, int, int], tuple[int, int, float]], hint: int = 1) -> Report:
    """Exercise A1: ``candidate(lora, base, head)`` is PEFT's (trainable, all, percent); ``base`` has the head once."""
    rule = "trainable = lora + head, all = base + lora + head (the head's copy), percent = 100 * trainable / all."

    def asked(lora: int, base: int, head: int) -> tuple[int, int, float]:
        question = "Which three numbers does PEFT report?"
        trainable, total, percent = need_several(candidate(lora, base, head), 3, "three numbers", question, rule)
        if not is_number(percent):
            raise Wrong(f"your percentage is {percent!r}", "Is it a number?", rule)
        return need_count(trainable), need_count(total), percent

    def compare(lora: int, base: int, head: int) -> None:
        trainable, total, percent = asked(lora, base, head)
        where = f"with lora={lora:,}, base={base:,}, head={head:,}"
        if trainable != lora + head:
            note = "the head trains, too" if head and trainable == lora else f"{lora + head:,} train"
            raise Wrong(f"{where} you call {trainable:,} trainable: {note}", "What trains besides A and B?", rule)
        if total != base + lora + head:
            slips = {
                base: "this is the base without the adapter",
                base + lora: "the head that trains is a copy beside the original, and both are counted",
                base + lora + 2 * head: "the original head is inside the base already",
            }
            note = slips.get(total, f"expected {base + lora + head:,}")
            raise Wrong(f"{where} you count {total:,} in all: {note}", "Which tensors does the model hold now?", rule)
        right = 100 * trainable / total
        if not close_number(percent, right):
            others = [(right / 100, "this is a fraction, not a percentage")]
            others += [(100 * trainable / base, "you divide by the base alone")]
            expected = f"expected {right:.6f}" + (", not rounded" if close_number(percent, right, 1e-2) else "")
            note = known_slip(percent, others, otherwise=expected)
            raise Wrong(f"{where} your percentage is {percent:.6f}: {note}", "What is the whole here?", rule)

    def plain() -> None:
        compare(random.randint(1000, 3000), random.randint(20_000, 90_000), 0)

    def with_head() -> None:
        compare(random.randint(1000, 3000), random.randint(20_000, 90_000), random.randint(500, 2500))

    def oracle() -> None:
        import peft

        width, labels, r = 8 * random.randint(2, 5), random.randint(2, 6), random.randint(2, 5)
        config = RobertaConfig(vocab_size=50, hidden_size=width, num_hidden_layers=2, num_attention_heads=2)
        model = meta_model(config, head="classification", num_labels=labels)
        lora = lora_parameters(model, r, ["query", "value"])
        base, head = count_parameters(model)[1], count_parameters(model.get_submodule("classifier"))[1]
        with torch.device("meta"):
            adapted = peft.get_peft_model(
                model, peft.LoraConfig(r=r, target_modules=["query", "value"], task_type="SEQ_CLS")
            )
        if asked(lora, base, head)[:2] != adapted.get_nb_trainable_parameters():
            compare(lora, base, head)

    steps = [
        ("a language model: base and LoRA", plain),
        ("a classifier: the head trains, and is counted twice", with_head),
        ("equal to PEFT on a RoBERTa-shaped classifier", oracle),
    ]
    return run_steps("PEFT's numbers", steps, hint)


@without(
    "lora_edu.counting", "peft",
    symptom="you call {name}, which counts for you",
    question="Which layers match, and what does each of them add?",
    fix="Walk model.named_modules(), and add r * sum(module.weight.shape) for each match.",
)  # fmt: skip
def count_targets(candidate: Callable[[nn.Module, int, list[str]], int], hint: int = 1) -> Report:
    """Exercise B1: ``candidate(model, r, targets)`` counts LoRA's parameters over a model's layers by name endings."""

    def llama() -> PretrainedConfig:
        return LlamaConfig(
            vocab_size=40,
            hidden_size=48,
            intermediate_size=random.randint(52, 78),
            num_hidden_layers=random.randint(2, 4),
            num_attention_heads=6,
            num_key_value_heads=2,
            attention_bias=True,
        )

    def gpt2() -> PretrainedConfig:
        return GPT2Config(
            vocab_size=random.randint(40, 70),
            n_positions=12,
            n_embd=24,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )

    def compare(model: nn.Module, targets: list[str], question: str, fix: str) -> None:
        r = random.randint(2, 9)
        got, right = need_count(candidate(model, r, list(targets))), lora_parameters(model, r, targets)
        if got == right:
            return
        seen = f"{targets} of a {type(model).__name__}, r={r}: you count {got:,}, not {right:,}"
        layers = [module for name, module in model.named_modules() if is_target(name, targets)]
        biases = sum(
            module.bias.numel() for module in layers if isinstance(getattr(module, "bias", None), nn.Parameter)
        )
        if biases and got in (right + biases, right + r * biases):
            raise Wrong(
                f"{seen}: biases are in it",
                "Which shapes have A and B? Is a bias among them?",
                "LoRA adds no bias: count r * (in + out), not the parameters of the layer.",
            )
        raise Wrong(seen, question, fix)

    def linear() -> None:
        compare(
            meta_model(llama()),
            ["q_proj", "v_proj", "down_proj"],
            "Do you read each layer's own in_features and out_features? v_proj is narrow here (GQA), down_proj oblong.",
            "Add r * (module.in_features + module.out_features) for each matching nn.Linear.",
        )

    def segments() -> None:
        model = nn.ModuleDict({"v_proj": nn.Linear(6, 5), "kv_proj": nn.Linear(6, 11)})
        model["v_proj_norm"] = nn.Linear(6, 3)
        compare(
            nn.ModuleDict({"block": model}),
            ["v_proj"],
            "Which of block.v_proj, block.kv_proj and block.v_proj_norm does the target v_proj mean?",
            'Match whole segments: name == target or name.endswith("." + target).',
        )

    def conv1d() -> None:
        compare(
            meta_model(gpt2()),
            ["c_attn", "c_proj"],
            "GPT-2's layers are transformers' Conv1D: what shape has their weight?",
            "A Conv1D's weight has the shape (in, out): add r * sum(module.weight.shape).",
        )

    def embedding() -> None:
        compare(
            meta_model(gpt2()),
            ["wte", "c_attn"],
            "An embedding maps num_embeddings to embedding_dim. Which shapes have its A and B?",
            "Add r * (num_embeddings + embedding_dim): again r * sum(module.weight.shape).",
        )

    def shared() -> None:
        layer = nn.Linear(7, 4)
        model = nn.ModuleDict({"a": nn.ModuleDict({"query": layer}), "b": nn.ModuleDict({"query": layer})})
        compare(
            model,
            ["query"],
            "One module is registered under two names. How many adapters does it get?",
            "model.named_modules() yields each module once: leave remove_duplicate at its default.",
        )

    def nothing() -> None:
        need_refusal(
            lambda: candidate(meta_model(llama()), 4, ["query"]),
            lambda got: f"a Llama has no layer called 'query', and you return {got} without a word",
            "What should a user see who misspells a target?",
            "Raise ValueError when no layer matches.",
        )

    def oracle() -> None:
        import peft

        for config, targets in ((llama(), ["k_proj", "up_proj"]), (gpt2(), ["c_fc", "wpe"])):
            r = random.randint(2, 9)
            got = candidate(meta_model(config), r, targets)
            with torch.device("meta"):
                model = peft.get_peft_model(
                    meta_model(config),
                    peft.LoraConfig(r=r, target_modules=targets, fan_in_fan_out=config.model_type == "gpt2"),
                )
            right, _ = model.get_nb_trainable_parameters()
            if got != right:
                raise Wrong(
                    f"PEFT trains {right:,} parameters on {targets} with r={r}, you count {got:,}",
                    "Which layer differs? Print name and count for each match.",
                    "Count one layer type at a time and compare to lora_edu.counting.lora_report.",
                )

    steps = [
        ("linear layers, each with its own shape", linear),
        ("whole name segments match, parts of words do not", segments),
        ("GPT-2's Conv1D layers", conv1d),
        ("embeddings", embedding),
        ("a module with two names counts once", shared),
        ("no match is an error", nothing),
        ("equal to PEFT on both models", oracle),
    ]
    return run_steps("count of a model", steps, hint)


@without(
    "safetensors.torch", "safetensors.numpy", "safe_open", "deserialize",
    symptom="you call {name} of the safetensors library; this exercise reads the bytes itself",
    question="What do the first 8 bytes say, and what follows them?",
    fix="data = path.read_bytes(); length = int.from_bytes(data[:8], 'little'); json.loads(data[8 : 8 + length]).",
)  # fmt: skip
def adapter_file(candidate: Callable[[Path], Mapping[str, int]], hint: int = 1) -> Report:
    """Exercise B2: ``candidate(path)`` reads a safetensors file's own header: parameters, header and tensor bytes."""
    fields = ("parameters", "header_bytes", "tensor_bytes")

    def compare(dtypes: list[torch.dtype], metadata: dict[str, str] | None, **more: tuple[int, ...]) -> None:
        r, shapes = random.randint(2, 7), [(random.randint(8, 40), random.randint(8, 40)) for _ in dtypes]
        tensors = {}
        for i, (dtype, (inputs, outputs)) in enumerate(zip(dtypes, shapes, strict=True)):
            tensors[f"layers.{i}.lora_A.weight"] = torch.zeros(r, inputs, dtype=dtype)
            tensors[f"layers.{i}.lora_B.weight"] = torch.zeros(outputs, r, dtype=dtype)
            for name, shape in more.items():
                tensors[f"layers.{i}.{name}"] = torch.zeros(shape, dtype=dtype)
        with temporary_folder() as folder:
            path = folder / WEIGHTS_FILE
            save_file(tensors, path, metadata=metadata)
            size = path.stat().st_size
            length = struct.unpack("<Q", path.read_bytes()[:8])[0]
            got = candidate(path)
        if not isinstance(got, dict):
            raise Wrong(f"you return a {type(got).__name__}", "Which keys does the task name?", f"Use {fields}.")
        if missing := [name for name in fields if name not in got]:
            raise Wrong(f"your result has no entry {missing[0]!r}", "Which keys does the task name?", f"Use {fields}.")
        numbers = sum(tensor.numel() for tensor in tensors.values())
        stored = sum(tensor.nbytes for tensor in tensors.values())
        right = {"parameters": numbers, "header_bytes": size - stored, "tensor_bytes": stored}
        types = " and ".join(sorted({dtype_name(tensor) for tensor in tensors.values()}))
        for name in ("header_bytes", "tensor_bytes", "parameters"):
            if need_count(got[name]) != right[name]:
                note = ""
                if name == "header_bytes" and got[name] == length:
                    note = ": the 8 bytes that hold the length are missing"
                elif name == "parameters" and got[name] == stored // 4:
                    note = ": not every number has 4 bytes"
                elif name == "parameters" and got[name] == len(tensors):
                    note = ": this is the number of tensors"
                elif name == "parameters" and got[name] == stored:
                    note = ": these are bytes, not numbers"
                raise Wrong(
                    f"a file of {size:,} bytes in {types}: your {name} is {got[name]:,}, not {right[name]:,}{note}",
                    "What do the first 8 bytes say, where do the tensors begin, and what does each entry's shape give?",
                    "length = struct.unpack('<Q', first 8 bytes); header_bytes = 8 + length; the rest are tensors; "
                    "parameters = the sum of the products of all shapes.",
                )

    def single() -> None:
        compare([torch.float32] * 3, None)

    def metadata() -> None:
        compare([torch.float32] * 2, {"format": "pt"})

    def mixed() -> None:
        compare([torch.bfloat16] * 3, {"format": "pt"})
        compare([torch.float32, torch.bfloat16, torch.float16], {"format": "pt"})

    def other_shapes() -> None:
        numbers, kernel = random.randint(5, 30), (random.randint(2, 9), 3, 2)
        compare([torch.float32, torch.bfloat16], None, magnitude=(numbers,), alpha=(), kernel=kernel)

    steps = [
        ("a float32 file", single),
        ("a file with a metadata entry, as PEFT writes it", metadata),
        ("16-bit numbers and mixed types", mixed),
        ("tensors that are no matrices: vectors, single numbers, kernels", other_shapes),
    ]
    return run_steps("adapter file", steps, hint)


def matched_ranks(candidate: Callable[[dict[str, int], int], Mapping[str, int]], hint: int = 1) -> Report:
    """Exercise C1: ``candidate(per_rank, budget)`` gives each target set the rank whose count is nearest the budget."""

    def compare(per_rank: dict[str, int], budget: int) -> None:
        got = candidate(dict(per_rank), budget)
        if not isinstance(got, dict) or got.keys() != per_rank.keys():
            seen = f"ranks for {', '.join(map(str, got))}" if isinstance(got, dict) else f"a {type(got).__name__}"
            names = ", ".join(per_rank)
            raise Wrong(f"you return {seen}; expected {names}", "Who asks for a rank?", "Return {name: rank}.")
        for name, each in per_rank.items():
            rank = got[name]
            if not is_whole(rank):
                raise Wrong(
                    f"{name}: rank {rank!r} is no whole number", "Can a matrix have half a row?", "Use int(...)."
                )
            if rank < 1:
                raise Wrong(
                    f"{name} costs {each:,} a rank, the budget is {budget:,}: rank {rank} adapts nothing",
                    "What is the smallest rank of an adapter?",
                    "Take max(1, ...).",
                )
            gap = abs(rank * each - budget)
            better = min((other for other in (rank - 1, rank + 1) if other >= 1), key=lambda o: abs(o * each - budget))
            if abs(better * each - budget) < gap:
                raise Wrong(
                    f"{name} costs {each:,} a rank: rank {rank} misses the budget {budget:,} by {gap:,}, "
                    f"rank {better} by {abs(better * each - budget):,}",
                    "Which whole rank comes nearest, from below or from above?",
                    "Round budget / per_rank to the nearest whole number, for each target set on its own.",
                )

    def exact() -> None:
        base = random.randint(50, 90)
        compare({"narrow": base, "wide": 3 * base}, 12 * base)

    def nearest() -> None:
        each = random.randint(100, 200)
        compare({"above": each}, 5 * each + each // 4)
        compare({"below": each}, 5 * each - each // 4)
        compare({"a": each, "b": 2 * each + 7, "c": 5 * each + 3}, 31 * each + 11)

    def floor() -> None:
        compare({"small": 10, "large": 5000}, 1000)

    def llama() -> None:
        sets = {"q, v": ["q_proj", "v_proj"], "MLP": ["gate_proj", "up_proj", "down_proj"], "all": "all-linear"}
        compare({name: lora_parameters("llama-7b", 1, chosen) for name, chosen in sets.items()}, 20_000_000)

    steps = [
        ("a budget that fits exactly", exact),
        ("otherwise the nearest rank, from either side", nearest),
        ("no rank below 1", floor),
        ("LLaMA-7B with 20 million parameters", llama),
    ]
    return run_steps("matched ranks", steps, hint)
