"""`.. public:: MODULE ...` documents the public names of some modules, and links find them without their module."""

from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

import optaxclip


class Public(SphinxDirective):
    """A table of the public names of the top level that some modules define, then the documentation of each."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """All of it, in the order in which the modules define it."""
        modules = [import_module(f"optaxclip.{name}") for name in self.arguments[0].split()]
        found = [(name, thing) for module in modules for name, thing in vars(module).items() if _is_own(module, thing)]
        public = [(name, thing) for name, thing in found if name in optaxclip.__all__]
        table = [".. autosummary::", "   :nosignatures:", "", *(f"   optaxclip.{name}" for name, _ in public)]
        entries = [
            f".. auto{'class' if isinstance(each, type) else 'function'}:: optaxclip.{name}" for name, each in public
        ]
        return self.parse_text_to_nodes("\n".join(table) + "\n\n" + "\n\n".join(entries))


def _is_own(module: Any, thing: Any) -> bool:
    return getattr(thing, "__module__", None) == module.__name__


def _link_to_top(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element) -> nodes.Element | None:
    """A link to a name of the top level from a module below it, or by the module that defines it (in signatures)."""
    target, domain = node.get("reftarget", "").removesuffix("()"), env.domains.python_domain
    name = target.rpartition(".")[2] if target.startswith("optaxclip.") else target
    for full in (f"optaxclip.{name}", f"optaxclip.core.{name}"):
        if full in domain.objects and domain.objects[full].objtype != "module":  # `norms` may be an argument
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", full, node, text)
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("public", Public)
    app.connect("missing-reference", _link_to_top)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
