"""Lines that prepare a machine, with pip or for Colab: in a graded notebook they do nothing, and their cell goes on.

Nothing is installed where notebooks are graded, since there is no network, or it is the teacher's own Python. And a
notebook that was written on Colab would lose each cell that begins with one of Colab's own imports.
"""

import ast
import re
from collections.abc import Callable

INSTALLERS = {"pip", "pip3", "conda", "mamba", "micromamba", "uv", "apt", "apt-get"}
COMMAND = re.compile(rf"\s*(?:sudo\s+)?(?:\S+\s+-m\s+)?(?:{'|'.join(sorted(INSTALLERS))})\b")  # {sys.executable} -m pip
COLAB = "google.colab"


class SetUpLines(ast.NodeTransformer):
    """Takes the calls of installers out of a cell, and lets a statement for Colab fail without the rest of its cell.

    What stands in an ``if`` or a ``try`` is left alone: somebody has thought of other machines there.

    Args:
        is_magic: whether there is a line magic of a name; Colab has some that are its own.
    """

    def __init__(self, is_magic: Callable[[str], object]):
        self.is_magic = is_magic
        self.names: set[str] = set()  # that come from Colab

    def visit_Module(self, node: ast.Module) -> ast.AST:
        """Guard the statements for Colab."""
        self.generic_visit(node)
        node.body = [_guarded(each) if self._is_for_colab(each) else each for each in node.body]
        return ast.fix_missing_locations(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Put nothing in place of what IPython makes of ``!pip …``, ``x = !pip …`` and ``%pip …``."""
        self.generic_visit(node)
        function, texts = node.func, [each.value for each in node.args if isinstance(each, ast.Constant)]
        if not isinstance(function, ast.Attribute) or not texts or not isinstance(texts[0], str):
            return node
        if function.attr in ("system", "getoutput") and COMMAND.match(texts[0]):
            return ast.copy_location(ast.Constant("" if function.attr == "getoutput" else None), node)
        if function.attr == "run_line_magic" and (texts[0] in INSTALLERS or not self.is_magic(texts[0])):
            return ast.copy_location(ast.Constant(None), node)
        return node

    def _is_for_colab(self, node: ast.stmt) -> bool:
        """Whether a statement imports something of Colab's, or is no more than a use of it."""
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            imported = [each for each in node.names if f"{origin}{each.name}.".startswith(f"{COLAB}.")]
            self.names |= {each.asname or each.name.partition(".")[0] for each in imported}
            return bool(imported)
        if not isinstance(node, ast.Expr | ast.Assign):
            return False
        parts = list(ast.walk(node))
        names = {each.id for each in parts if isinstance(each, ast.Name)}
        texts = [each.value for each in parts if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        return bool(names & self.names) or any(COLAB in text for text in texts)


def _guarded(node: ast.stmt) -> ast.stmt:
    handler = ast.ExceptHandler(ast.Name("Exception", ast.Load()), None, [ast.Pass()])
    return ast.copy_location(ast.Try([node], [handler], [], []), node)
