"""Find and undo what a submission changed in the grader's own code, and in the libraries that the checks rely on.

The snapshot holds the functions, classes and constants of ``lora_edu``, of the parts of PyTorch, NumPy and Python that
checks call, and the code inside the functions of ``lora_edu``. It finds replaced things; it cannot find everything.
"""

import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

LIBRARIES = {
    "builtins", "cmath", "contextlib", "copy", "decimal", "fractions", "functools", "inspect", "itertools", "json",
    "json.encoder", "math", "numpy", "numpy.linalg", "numpy.random", "numpy.testing", "operator", "os", "os.path",
    "pathlib", "random", "re", "safetensors", "safetensors.torch", "socket", "statistics", "tempfile", "torch",
    "torch._tensor", "torch.autograd", "torch.autograd.grad_mode", "torch.functional", "torch.linalg", "torch.nn",
    "torch.nn.functional", "torch.nn.init", "torch.nn.parameter", "torch.random", "torch.testing",
    "torch.testing._comparison",
}  # fmt: skip
FAMILIES = ("lora_edu.", "torch.nn.modules.")
MISSING = object()


class Snapshot:
    """What the tracked modules and their classes hold at this moment."""

    def __init__(self) -> None:
        self.modules = {name: module for name, module in sys.modules.items() if _tracked(name)}
        self.values: list[tuple[str, Any, dict[str, Any]]] = []
        self.code: dict[FunctionType, tuple[Any, Any, Any]] = {}
        for name, module in self.modules.items():
            if not isinstance(module, ModuleType):
                continue
            self.values.append(
                (name, module, {key: value for key, value in vars(module).items() if _counts(key, value)})
            )
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__ == name:
                    self.values.append((f"{name}.{value.__qualname__}", value, dict(vars(value))))
        for name, _, held in self.values:
            for value in held.values():
                function = getattr(value, "__func__", value)
                if isinstance(function, FunctionType) and name.startswith("lora_edu"):
                    self.code[function] = (function.__code__, function.__defaults__, function.__kwdefaults__)

    def restore(self) -> list[str]:
        """Put everything back; the names of what had been changed."""
        changed = []
        for name, module in self.modules.items():
            if sys.modules.get(name) is not module:
                sys.modules[name] = module
                changed.append(name)
        for name, owner, held in self.values:
            for key in list(_differences(owner, held)):
                if _put(owner, key, held.get(key, MISSING)):
                    changed.append(f"{name}.{key}")
        for function, (code, defaults, keywords) in self.code.items():
            if (function.__code__, function.__defaults__, function.__kwdefaults__) != (code, defaults, keywords):
                function.__code__, function.__defaults__, function.__kwdefaults__ = code, defaults, keywords
                changed.append(f"{function.__module__}.{function.__qualname__}")
        return changed


def _tracked(name: str) -> bool:
    return name in LIBRARIES or name == "lora_edu" or name.startswith(FAMILIES)


def _counts(key: str, value: Any) -> bool:
    """Functions, classes, modules, and constants in capitals; not what a module keeps for itself between calls."""
    if key.startswith("__") and key.endswith("__") and key not in ("__import__", "__build_class__"):
        return False
    return callable(value) or isinstance(value, ModuleType) or (key.isupper() and not key.startswith("_"))


def _differences(owner: Any, held: dict[str, Any]) -> Iterator[str]:
    now = vars(owner)
    for key, value in held.items():
        if now.get(key, MISSING) is not value and (not isinstance(owner, type) or _is_code(value)):
            yield key
    if isinstance(owner, type):  # a method that was added may hide the one of a base class
        for key in now.keys() - held.keys():
            if _is_code(now[key]) and any(key in vars(base) for base in owner.__mro__[1:]):
                yield key


def _is_code(value: Any) -> bool:
    return callable(value) or isinstance(value, property | staticmethod | classmethod)


def _put(owner: Any, key: str, value: Any) -> bool:
    try:
        if value is MISSING:
            delattr(owner, key)
        else:
            setattr(owner, key, value)
    except (AttributeError, TypeError):
        return False
    return True
