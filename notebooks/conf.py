"""The documentation: `python -m sphinx -W --keep-going -b html notebooks site`, with the extra `docs`.

The extensions that only this site needs are in `_extensions`. The API pages name modules and no functions, so that no
new function can be forgotten. Notebooks are shown with the outputs that they were committed with.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_extensions"), str(HERE.parent)]  # the checkout, not another optaxclip that is installed

import optaxclip  # noqa: E402

project = "optaxclip"
author = "The optaxclip contributors"
version = release = optaxclip.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "mathml",
    "public_names",
    "repository_links",
    "signatures",
]
exclude_patterns = ["README.md", "_*", "**.ipynb_checkpoints"]

# Pages and notebooks.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

# Docstrings.
add_function_parentheses = False
maximum_signature_line_length = 80
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has the types
napoleon_custom_sections = [
    "Returns",  # as text: what stands before a colon there is no type
]
toc_object_entries_show_parents = "hide"

# What stands in single backticks is code, and a link where it is a public name. It may be the name of an argument, a
# formula or a whole call, so only what is named with its module must exist.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", r"(?s)(?!(optaxclip|norms|thresholds|diagnostics|per_example|contrib)\.).*"),
    ("py:class", r"Figure"),  # matplotlib's, which is imported for types alone
    ("py:class", r"(collections|jax|np|numpy|optax|optaxclip\._(arrays|numerics)|pathlib|typing)\b.*"),
]

# Looks. Nothing is loaded from another host: tests/documents/built_site.py checks the built pages.
html_theme = "sphinx_book_theme"
html_title = f"optaxclip {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_last_updated_fmt = None
html_theme_options = {
    "navbar_persistent": [],  # the search is in the sidebar
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "pygments_light_style": "github-light",
    "pygments_dark_style": "github-dark",
}
