"""Signatures with the types that the source names: `max_norm: Bound`, where Python itself only sees `Any`."""

import ast
import inspect
import textwrap
from typing import Any

from sphinx.application import Sphinx


class _Short(ast.NodeTransformer):
    """Drops the module in front of the library's own types: `mesh.Axes` is `Axes`."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """Called for each `module.Name`."""
        is_own = isinstance(node.value, ast.Name) and node.value.id not in ("jax", "np", "optax")
        return ast.Name(node.attr) if is_own else node


def _as_written(app: Sphinx, what: str, name: str, thing: Any, *_: Any) -> tuple[str, str | None] | None:
    if not what.startswith(("function", "class")) or not getattr(thing, "__module__", "").startswith("optaxclip"):
        return None
    definition = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))).body[0]
    if isinstance(definition, ast.ClassDef):
        fields = [field for field in definition.body if isinstance(field, ast.AnnAssign)]
        return f"({', '.join(_field(field) for field in fields)})", None
    assert isinstance(definition, ast.FunctionDef)
    arguments = definition.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if argument and argument.annotation:
            argument.annotation = _Short().visit(argument.annotation)
    returns = definition.returns
    return f"({ast.unparse(arguments)})", ast.unparse(_Short().visit(returns)) if returns else None


def _field(field: ast.AnnAssign) -> str:
    default = f" = {ast.unparse(field.value)}" if field.value else ""
    return f"{ast.unparse(field.target)}: {ast.unparse(_Short().visit(field.annotation))}{default}"


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", _as_written)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
