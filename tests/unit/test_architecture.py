"""The plan of the house: who may import whom, how long a module may be, and that everything public is documented."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lora_edu

PACKAGE = Path(lora_edu.__file__).parent
# The rooms, lowest first: a module imports from rooms below its own, and within its own without a cycle.
# "" is what lies beside the rooms: paths and files, and mathematics.
ROOMS = [
    "", "core", "counting", "variants", "rivals", "fast", "lab", "lab.recording", "serving", "serving.inspection",
    "course.checks", "course.notebooks", "course.grading", "course.publish", "course",
]  # fmt: skip
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
LONGEST = 300
# The checks of an exercise may be as long as their lesson needs.
ANY_LENGTH = "course.checks.lesson_"


def name_of(path: Path, package: Path = PACKAGE) -> str:
    """``core.layer``; a room's ``__init__`` goes by the room's name."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(name: str) -> int:
    """The number of a module's room, given the module's name or the room's own."""
    room = name if name in ROOMS else name.rpartition(".")[0]
    return ROOMS.index(room)


def imports(path: Path, package: Path = PACKAGE) -> set[str]:
    """The modules of this package that a file imports, by their names in it, in whatever form it says so."""
    found = set()
    inside = [package.name, *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == package.name or name.startswith(package.name + "."):
                found.add(module_in(name.split(".")[1:], package))
    return found - {name_of(path, package)}


def module_in(parts: list[str], package: Path) -> str:
    """The longest beginning of ``core.layer.LoRALinear`` that is a module or a room: ``core.layer``."""
    while parts:
        place = package.joinpath(*parts)
        if place.with_suffix(".py").is_file() or place.is_dir():
            break
        parts = parts[:-1]
    return ".".join(parts)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_to_lower_rooms(path):
    own = name_of(path)
    for other in imports(path):
        assert other, f"{own} imports from lora_edu itself, which imports everything: name the module"
        assert room_of(other) <= room_of(own), f"{own} imports {other}, which is in a room above its own"


def test_no_room_has_a_cycle():
    for number, room in enumerate(ROOMS):
        here = {name_of(path): path for path in MODULES if room_of(name_of(path)) == number}
        graph = {name: {other for other in imports(path) if other in here} for name, path in here.items()}
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(f"room {room or 'lora_edu'!r}: {' → '.join(error.args[1])}")


@pytest.mark.parametrize(
    "line",
    [
        "import p.core.layer",
        "import p.core.layer as x",
        "from p.core import layer",
        "from p.core.layer import LoRALinear",
        "from .core import layer",
        "from .core.layer import A, B",
        "from . import core",
        "def f():\n    from p import core",
    ],
)
def test_every_form_of_import_is_seen(tmp_path, line):
    package = tmp_path / "p"
    (package / "core").mkdir(parents=True)
    (package / "core" / "layer.py").touch()
    (package / "other.py").write_text(line)
    assert imports(package / "other.py", package) <= {"core", "core.layer"}
    assert imports(package / "other.py", package)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("from . import adapter", "core.adapter"),
        ("from .adapter import x", "core.adapter"),
        ("from .. import files", "files"),
        ("from ..files import ROOT", "files"),
        ("from .. import core", "core"),
        ("import torch", None),
    ],
)
def test_relative_imports_are_resolved(tmp_path, line, expected):
    package = tmp_path / "p"
    (package / "core").mkdir(parents=True)
    for name in ("files.py", "core/adapter.py"):
        (package / name).touch()
    (package / "core" / "layer.py").write_text(line)
    assert imports(package / "core" / "layer.py", package) == ({expected} if expected else set())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_short_enough_to_read_in_one_sitting(path):
    if not name_of(path).startswith(ANY_LENGTH):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_and_public_name_is_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in tree.body:
        helper = node.name.startswith("_") if isinstance(node, ast.FunctionDef | ast.ClassDef) else True
        if not helper and "checks.lesson_" not in name_of(path):
            assert ast.get_docstring(node), f"{name_of(path)}.{node.name} has no docstring"
