"""*Your turn*: cells in the flow of a lesson in which the learner writes the few lines that matter.

In ``lessons/`` such a cell (tag ``your-turn``) holds the solution, executed, and its metadata hold the stub. A copy for
learners gets the stub instead. The cell after it calls ``checks.use``, which goes on with whatever passes its check.
"""

import ast
from collections.abc import Iterator

from nbformat import NotebookNode

from lora_edu.course.notebooks.stored import clear_outputs

TAG = "your-turn"


def learners_copy(notebook: NotebookNode) -> NotebookNode:
    """The notebook as a learner gets it, in place: outputs cleared, and stubs where there were solutions."""
    for cell in clear_outputs(notebook).cells:
        if TAG in cell.metadata.get("tags", []):
            cell.source = cell.metadata.pop("stub", cell.source)  # in such a copy it stands there already
    return notebook


def problems_of_your_turn(notebook: NotebookNode) -> Iterator[str]:
    """One sentence for each such cell whose stub would not run, differs in its names, or is not checked."""
    for index, cell in enumerate(notebook.cells):
        if TAG not in cell.metadata.get("tags", []):
            if "stub" in cell.metadata:
                yield f"cell {index}: has a stub, but not the tag {TAG}"
            continue
        stub = cell.metadata.get("stub", "")
        try:
            same = signatures(stub) == signatures(cell.source) != []
        except SyntaxError as error:
            yield f"cell {index}: its stub is not Python: {error}"
            continue
        if not same:
            yield f"cell {index}: its stub defines {signatures(stub)}, the solution {signatures(cell.source)}"
        if "NotImplementedError" not in stub or "NotImplementedError" in cell.source:
            yield f"cell {index}: the stub, and only the stub, raises NotImplementedError"
        after = notebook.cells[index + 1] if index + 1 < len(notebook.cells) else None
        if after is None or "use(" not in after.source or "otherwise=" not in after.source:
            yield f"cell {index}: the cell after it does not call use(…, otherwise=…, check=…)"


def signatures(source: str) -> list[str]:
    """The functions and classes that a cell defines, with the arguments of functions and methods."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found.append(f"{node.name}({ast.unparse(node.args)})")
        elif isinstance(node, ast.ClassDef):
            methods = [
                f"{each.name}({ast.unparse(each.args)})" for each in node.body if isinstance(each, ast.FunctionDef)
            ]
            found.append(f"{node.name}: {', '.join(methods)}")
    return found
