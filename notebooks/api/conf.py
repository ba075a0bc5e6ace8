"""The API pages, from the docstrings: `python -m sphinx -W --keep-going -b html notebooks/api OUT`.

It needs the extra `docs`. The pages name modules and no functions, so that no new function can be forgotten.
"""

from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

import optaxclip

project = "optaxclip"
release = optaxclip.__version__
html_theme = "alabaster"
html_theme_options = {"fixed_sidebar": True, "page_width": "1120px"}
html_copy_source = False
html_show_copyright = False

extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
maximum_signature_line_length = 100
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has the types
napoleon_custom_sections = [
    "Returns",  # as text: what stands before a colon there is no type
]

# What stands in single backticks is code, and a link where it is a public name. It may be the name of an argument, a
# formula or a whole call, so only what is named with its module must exist.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", r"(?s)(?!(optaxclip|norms|thresholds|diagnostics|per_example|contrib)\.).*"),
    ("py:class", r"Figure"),  # matplotlib's, which is imported for types alone
    ("py:class", r"(collections|jax|numpy|optax|optaxclip\._(arrays|numerics)|pathlib|typing)\b.*"),
]


class Public(SphinxDirective):
    """The public names of the top level that some modules define, in the order in which they do."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """The documentation of each."""
        modules = [import_module(f"optaxclip.{name}") for name in self.arguments[0].split()]
        found = [(name, thing) for module in modules for name, thing in vars(module).items() if _is_own(module, thing)]
        public = [(name, thing) for name, thing in found if name in optaxclip.__all__]
        lines = [
            f".. auto{'class' if isinstance(each, type) else 'function'}:: optaxclip.{name}" for name, each in public
        ]
        return self.parse_text_to_nodes("\n\n".join(lines))


def _is_own(module: Any, thing: Any) -> bool:
    return getattr(thing, "__module__", None) == module.__name__


def _link_to_top(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element) -> nodes.Element | None:
    """A link to a name of the top level from a module below it, or by the module that defines it (in signatures)."""
    target, domain = node.get("reftarget", "").removesuffix("()"), env.domains.python_domain
    name = target.rpartition(".")[2] if target.startswith("optaxclip.") else target
    full = f"optaxclip.{name}"
    if full in domain.objects and domain.objects[full].objtype != "module":  # `norms` may be an argument
        return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", full, node, text)
    return None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_directive("public", Public)
    app.connect("missing-reference", _link_to_top)
