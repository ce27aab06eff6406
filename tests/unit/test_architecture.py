"""The plan of the house: who may import whom, and how long a module may be."""

import ast
from pathlib import Path

import pytest

import lora_edu

PACKAGE = Path(lora_edu.__file__).parent
FLOORS = {
    "matching": 0, "lab.bases": -1, "lab.datasets": 0, "lab.plots": 0,
    "lowrank": 1, "meta": 1, "counting": 2, "adapter": 1, "layer": 3,
    "config": 4, "fast": 4, "fast_steps": 4, "fast_layers": 5, "extras": 5, "inject": 6,
    "merging": 7, "peft_io": 7, "diagnose": 8, "mixed": 8, "hotswap": 8,
    "lab.processes": 1, "lab.stopping": 0, "lab.training": 2, "lab.wheels": -2, "lab.paths": -2, "lab.serving": 9,
    "lab.records": 8, "lab.experiments": 7, "lab.sizes": 0, "lab.sweeps": 3, "lab.scripts": 0, "lab.full_runs": 9,
    "measure": 0, "flops": 0, "activations": 3, "memory": 4,
    "course": 10,
}  # fmt: skip
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def floor(name: str) -> int:
    return FLOORS["course" if name.startswith("course") else name]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, with or without a name after them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lora_edu"):
            inside = node.module.removeprefix("lora_edu").lstrip(".")
            for alias in node.names:
                longer = f"{inside}.{alias.name}".lstrip(".")
                known = (PACKAGE / (longer.replace(".", "/") + ".py")).is_file()
                found.add(longer if known else inside)
    return found - {"", "lab", "course", "course.checks"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downwards(path):
    own = name_of(path)
    for other in imports(path):
        if own.startswith("course") and other.startswith("course"):
            continue
        assert floor(other) < floor(own), f"{own} (floor {floor(own)}) imports {other} (floor {floor(other)})"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_short_enough_to_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_and_public_name_is_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in tree.body:
        helper = node.name.startswith("_") if isinstance(node, ast.FunctionDef | ast.ClassDef) else True
        if not helper and "checks.lesson_" not in name_of(path):
            assert ast.get_docstring(node), f"{name_of(path)}.{node.name} has no docstring"
