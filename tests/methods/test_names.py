"""Nothing in core, fast, serving and lab knows a method by name: not by its classes, its ``peft_type`` or its tensors.

A method's classes are those that derive from ``AdapterLayer`` and ``AdapterConfig``; they may be named where they are
defined, and in the file that brings layer and config together and registers them. Everywhere else, to mention one is
enough to fail: an import, an ``isinstance``, a comparison of types. Texts count where the program compares or looks
something up with them, not in messages.
"""

import ast
import importlib
import pkgutil
import re
from functools import cache

import pytest

import lora_edu
from lora_edu.core.adapter import AdapterLayer
from lora_edu.core.config import AdapterConfig

ROOMS = ("core", "fast", "serving", "lab")
HOME = {"core.layer", "core.config", "core.lora_entrants"}  # of LoRA, the only method that lives in the core
LOOKUPS = {"hasattr", "getattr", "setattr", "startswith", "endswith", "get", "pop"}
# Names of methods, of their types in PEFT's files, of their tensors and their own settings.
METHOD_WORD = re.compile(r"(^|\.)lora_(?!edu\b)|^(lora|LORA|LoRA\w*|LoraConfig)$|use_dora|pissa|vera_|hada_|ia3_")

EXCEPTIONS = {
    # What PEFT does with a file of type LORA in a mixture of experts; for other types nothing is looked up.
    "core.experts": {"LORA"},
    "core.peft_io": {"LORA"},
    # In a message: where a bare layer cannot be replaced in place, it points to the class that wraps it by hand.
    "core.state": {"LoRALinear"},
    # Embeddings and heads with added tokens: under which key PEFT looks for them depends on LoRA's.
    "core.vocabulary": {".lora_embedding_A", ".lora_A.weight"},
    # Names a kind of parameter for people, in PEFT's models too: shortens what it knows and leaves the rest.
    "lab.diagnose": {"lora_"},
    # llama.cpp's adapter files hold LoRA's A and B and nothing else: what is no A or B is refused.
    "serving.gguf": {"LORA", ".lora_", ".lora_A.weight", ".lora_B.weight"},
    # Reads files of all methods and of other programs, and tells them apart by the names of their tensors and settings.
    "serving.inspection.factors": {"use_dora"},
    "serving.inspection.formats": {
        "lora_magnitude_vector",
        "lora_parameters",
        "lora_adapter_metadata",
        "lora_alpha",
        ".lora_alpha",
        "lora_up",
        "lora_a",
        ".lora_a",
        ".lora_b",
    },
    "serving.inspection.settings": {"lora_parameters"},
    # A recorded experiment chooses its method, as a learner does; the choice is part of the record.
    "lab.recording.experiments": {"LoraConfig", "lora"},
    "lab.recording.labels": {"LoraConfig"},
    "lab.recording.sweeps": {"lora"},
}


@cache
def modules():
    """{name: source} of every module in these rooms."""
    found = {}
    for info in pkgutil.walk_packages(lora_edu.__path__, "lora_edu."):
        name = info.name.removeprefix("lora_edu.")
        if name.split(".")[0] in ROOMS and not info.ispkg:
            found[name] = importlib.util.find_spec(info.name).origin
    return found


@cache
def method_classes():
    """The names of the classes that derive from the contract's two, anywhere in the package."""
    for info in pkgutil.walk_packages(lora_edu.__path__, "lora_edu."):
        if info.name.split(".")[1] in (*ROOMS, "variants", "rivals"):
            importlib.import_module(info.name)
    waiting, names = [AdapterLayer, AdapterConfig], set()
    while waiting:
        for each in waiting.pop().__subclasses__():
            waiting.append(each)
            if each.__module__.startswith("lora_edu."):
                names.add(each.__name__)
    return names


def named(source, classes):
    """What a module's code says of methods."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name | ast.Attribute):
            found |= {node.id if isinstance(node, ast.Name) else node.attr} & classes
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.name.rpartition(".")[2] for alias in node.names} & classes
        elif isinstance(node, ast.Compare):
            found |= words(node)
        elif isinstance(node, ast.Call) and called(node) in LOOKUPS:
            found |= {word for argument in node.args for word in words(argument)}
    return found


def called(node):
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def words(node):
    texts = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return {text for text in texts if METHOD_WORD.search(text)}


@pytest.mark.parametrize("name", [name for name in modules() if name not in HOME])
def test_no_method_by_name(name):
    with open(modules()[name], encoding="utf-8") as file:
        found = named(file.read(), method_classes())
    assert found <= EXCEPTIONS.get(name, set()), f"{name} knows a method: {found - EXCEPTIONS.get(name, set())}"


def test_exceptions_are_no_more_than_needed():
    for name, words in EXCEPTIONS.items():
        with open(modules()[name], encoding="utf-8") as file:
            assert words <= named(file.read(), method_classes()), name


def test_the_methods_of_the_package_are_found():
    assert {"LoRALinear", "LoRAConv1D", "LoRAEmbedding", "LoraConfig"} <= method_classes()


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(layer, LoRALinear)",
        "type(config) is LoraConfig",
        "from lora_edu.core.layer import LoRAEmbedding",
        "import lora_edu.core.layer as x; issubclass(kind, x.LoRALinear)",
        "match layer:\n    case LoRALinear():\n        pass",
        "config.peft_type == 'LORA'",
        "type(layer).__name__ == 'LoRALinear'",
        "hasattr(layer, 'lora_A')",
        "getattr(config, 'use_dora', False)",
        "key.endswith('.lora_A.weight')",
        "f'{name}.lora_A' in tensors",
        "config.init_lora_weights == 'pissa'",
    ],
)
def test_each_way_to_name_a_method_is_seen(line):
    assert named(line, {"LoRALinear", "LoRAEmbedding", "LoraConfig"})


@pytest.mark.parametrize(
    "line",
    [
        "raise ValueError('call inject(model, LoraConfig(...))')",
        "'''LoRALinear is one of them.'''",
        "isinstance(layer, AdapterLayer) and layer.additive",
        "os.environ.get('LORA_EDU_PROGRESS') == '0'",
        "name.startswith('lora_edu.')",
    ],
)
def test_messages_and_the_packages_own_name_are_left_alone(line):
    assert not named(line, {"LoRALinear", "LoRAEmbedding", "LoraConfig"})
