"""The checks of lesson 05 that need a model or a file: counting by targets, and reading an adapter's header."""

import random
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from lora_edu.core.matching import is_target
from lora_edu.counting import lora_parameters
from lora_edu.counting.meta import meta_model
from lora_edu.course.checks.report import Report, Wrong, run_steps


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
        got, right = candidate(model, r, targets), lora_parameters(model, r, targets)
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
        try:
            got = candidate(meta_model(llama()), 4, ["query"])
        except ValueError:
            return
        raise Wrong(
            f"a Llama has no layer called 'query', and you return {got} without a word",
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


def adapter_file(candidate: Callable[[Path], Mapping[str, int]], hint: int = 1) -> Report:
    """Exercise B2: ``candidate(path)`` reads a safetensors file's own header: parameters, header and tensor bytes."""
    fields = ("parameters", "header_bytes", "tensor_bytes")

    def compare(dtypes: list[torch.dtype], metadata: dict[str, str] | None) -> None:
        r, shapes = random.randint(2, 7), [(random.randint(8, 40), random.randint(8, 40)) for _ in dtypes]
        tensors = {}
        for i, (dtype, (inputs, outputs)) in enumerate(zip(dtypes, shapes, strict=True)):
            tensors[f"layers.{i}.lora_A.weight"] = torch.zeros(r, inputs, dtype=dtype)
            tensors[f"layers.{i}.lora_B.weight"] = torch.zeros(outputs, r, dtype=dtype)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter_model.safetensors"
            save_file(tensors, path, metadata=metadata)
            size = path.stat().st_size
            length = struct.unpack("<Q", path.read_bytes()[:8])[0]
            got = candidate(path)
        missing = [name for name in fields if name not in got]
        if missing:
            raise Wrong(f"your result has no entry {missing[0]!r}", "Which keys does the task name?", f"Use {fields}.")
        numbers = sum(tensor.numel() for tensor in tensors.values())
        stored = sum(tensor.nbytes for tensor in tensors.values())
        right = {"parameters": numbers, "header_bytes": size - stored, "tensor_bytes": stored}
        types = " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))
        for name in ("header_bytes", "tensor_bytes", "parameters"):
            if got[name] != right[name]:
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

    steps = [
        ("a float32 file", single),
        ("a file with a metadata entry, as PEFT writes it", metadata),
        ("16-bit numbers and mixed types", mixed),
    ]
    return run_steps("adapter file", steps, hint)
