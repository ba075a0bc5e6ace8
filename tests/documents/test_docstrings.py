"""Every public docstring helps: what it does in one line, each argument, an example, and names that exist.

Each test looks at all of them and lists what fails. That the examples run is doctest's to check (`--doctest-modules`),
and that the text is well-formed the site's, which is built with warnings as errors.
"""

import ast
import builtins
import doctest
import inspect
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip as oc
from tests.table import ROWS

ROOT = Path(__file__).parents[2]
MODULES = {name: getattr(oc, name) for name in oc.__all__ if inspect.ismodule(getattr(oc, name))}
PER_EXAMPLE = {"per_example_global_norm_clip", "per_example_layer_norm_clip", "per_example.clipped_value_and_grad"}


def own_names(module):
    """What a module of the library offers: its `__all__`, or the public functions that it defines."""
    if hasattr(module, "__all__"):
        return module.__all__
    functions = inspect.getmembers(module, inspect.isfunction)
    return [name for name, f in functions if f.__module__ == module.__name__ and not name.startswith("_")]


def public():
    """Every public object but modules, by its name below `optaxclip`."""
    top = {name: getattr(oc, name) for name in oc.__all__ if name not in MODULES}
    below = {place: {name: getattr(module, name) for name in own_names(module)} for place, module in MODULES.items()}
    return top | {f"{place}.{name}": found for place, names in below.items() for name, found in names.items()}


PUBLIC = public()
CLASSES = {name: found for name, found in PUBLIC.items() if inspect.isclass(found)}
FUNCTIONS = {name: found for name, found in PUBLIC.items() if name not in CLASSES}
# What goes into a training run. The rows of tests/table.py name contrib's methods without their place.
TRANSFORMATIONS = {
    name for name in FUNCTIONS if name.removeprefix("contrib.") in {row.public for row in ROWS} | {"clip_cotangents"}
} | PER_EXAMPLE


def text_of(name):
    return inspect.getdoc(PUBLIC[name]) or ""


def sections_of(name):
    """The text below each heading: up to four words at the margin, with a capital in front and a colon behind."""
    parts = re.split(r"^([A-Z]\S*(?: [^\s`]+){0,3}):$", text_of(name), flags=re.MULTILINE)
    return {heading: _indented(body) for heading, body in zip(parts[1::2], parts[2::2], strict=True)}


def _indented(body):
    """What of a text belongs to its heading: up to the first line at the margin."""
    return re.split(r"^(?=\S)", body.strip("\n"), maxsplit=1, flags=re.MULTILINE)[0]


def entries_of(body):
    """The names that a section of Google style explains: `  name: text`, with further lines indented deeper."""
    first_lines = re.findall(r"^  (?=\S).*", body, flags=re.MULTILINE)
    matches = [re.match(r"  \*{0,2}(\w+): \S", line) for line in first_lines]
    return [match[1] if match else line for match, line in zip(matches, first_lines, strict=True)]


def assert_none_fails(check, names):
    """Asserts that a check has nothing to say of any name, and lists all of which it has."""
    failing = {name: said for name in names if (said := check(name))}
    assert not failing, "".join(f"\n{name}: {said}" for name, said in failing.items())


# The sections.


def test_all_that_is_public_is_checked():
    callables = {name for name in oc.__all__ if callable(getattr(oc, name))}
    assert callables <= set(PUBLIC)
    assert {f"contrib.{name}" for name in oc.contrib.__all__} - set(CLASSES) <= TRANSFORMATIONS
    assert {row.public for row in ROWS} <= {name.rpartition(".")[2] for name in TRANSFORMATIONS}


def test_the_first_line_is_a_sentence():
    def check(name):
        first, *rest = text_of(name).splitlines() or [""]
        is_sentence = first.endswith(".") and len(first.split()) >= 3 and (first[0].isupper() or first[0] == "`")
        return None if is_sentence and not (rest and rest[0]) else first

    assert_none_fails(check, PUBLIC)


# What Sphinx knows, and what notebooks/conf.py adds.
HEADINGS = {"Args", "Attributes", "Example", "Notes", "Raises", "References", "See also"}


def test_every_heading_is_one_that_the_pages_render():
    configuration = (ROOT / "notebooks" / "conf.py").read_text()

    def check(name):
        return [
            heading
            for heading in sections_of(name)
            if {heading} - HEADINGS and f'    "{heading}",' not in configuration
        ]

    assert_none_fails(check, PUBLIC)


def test_no_section_is_empty():
    """Neither without text, nor with one that says that there is nothing to say."""
    assert_none_fails(lambda name: [h for h, body in sections_of(name).items() if says_nothing(body)], PUBLIC)


def says_nothing(body):
    texts = [re.sub(r"^- [^:]*: ", "", text.strip()) for text in re.split(r"^  (?=- )", body, flags=re.MULTILINE)]
    return not body.strip() or any(
        text.strip("-. ").lower() in {"nothing", "none", "n/a", "todo"} for text in texts if text
    )


def test_arguments_and_fields_are_explained_and_no_others():
    def check(name):
        is_class = name in CLASSES
        explained = entries_of(sections_of(name).get("Attributes" if is_class else "Args", ""))
        there = fields_of(PUBLIC[name]) if is_class else list(inspect.signature(PUBLIC[name]).parameters)
        return None if explained == there else {"explained": explained, "there": there}

    assert_none_fails(check, PUBLIC)


def fields_of(found):
    return list(getattr(found, "_fields", None) or found.__dataclass_fields__)


def test_types_say_something():
    """`Bound` and `Tree` do, on the page of the types; `Any` does not."""

    def check(name):
        definition = ast.parse(inspect.getsource(inspect.unwrap(FUNCTIONS[name]))).body[0].args
        arguments = [*definition.posonlyargs, *definition.args, *definition.kwonlyargs]
        return [argument.arg for argument in arguments if re.search(r"(^|\| )Any\b", ast.unparse(argument.annotation))]

    assert_none_fails(check, FUNCTIONS)


def test_it_says_what_comes_back():
    returning = [name for name, found in FUNCTIONS.items() if inspect.signature(found).return_annotation is not None]
    assert [name for name in returning if "Returns" not in sections_of(name)] == []


def test_what_is_raised_is_an_exception():
    def check(name):
        raised = entries_of(sections_of(name).get("Raises", ""))
        return [error for error in raised if not _is_exception(getattr(builtins, error, None))]

    assert_none_fails(check, FUNCTIONS)


def _is_exception(found):
    return inspect.isclass(found) and issubclass(found, Exception)


def test_a_transformation_has_its_update_as_math():
    assert [name for name in TRANSFORMATIONS if not re.search(r"^\.\. math:: \S", text_of(name), re.MULTILINE)] == []


def test_an_example_uses_what_it_explains_and_prints_something_to_check():
    def check(name):
        examples = doctest.DocTestParser().get_examples(sections_of(name).get("Example", ""))
        source = "".join(example.source for example in examples)
        is_used = re.search(rf"\b{name.rpartition('.')[2]}\(", source)
        is_checked = any(example.want for example in examples) and not any(example.options for example in examples)
        return None if is_used and is_checked else source or "no example"

    assert_none_fails(check, FUNCTIONS)


# The names in them. What stands in single backticks and reads as an expression of Python must mean something.

PACKAGES = {"jax": jax, "jnp": jnp, "math": math, "np": np, "numpy": np, "optax": optax, "optaxclip": oc}
# Of transformations and Norms, of a loss and its batch, and of what installs matplotlib.
WORDS = {
    *("argument", "gradients", "grads", "inf", "leaf", "leaves", "path", "schedule", "step", "tx", "update"),
    *("aux", "loss", "rows", "value", "values", "demo"),
}
# What docstrings name of other libraries, and of some versions of jax alone.
FOREIGN = {
    *("AdaGC", "ClippyAdagrad", "clip_update_by_historical_norm", "clipnorm", "clipped_grad", "jax_privacy", "nn"),
    *("percentile_clipping", "pre_clipping_transform", "tf", "torch", "wandb.log", "writer.scalar", "zclip"),
    *("flax.nnx.training.optimizer", "nnx.Optimizer", "to_opt_state"),
    *("figure.savefig", "jax.lax.pcast", "jax.lax.pvary"),
}
KEYS = set(re.findall(r"^`(\w+)` ", text_of("clip_stats"), flags=re.MULTILINE))  # of what `clip_stats` returns


def arguments_of(found):
    return {*fields_of(found)} if inspect.isclass(found) else {*inspect.signature(found).parameters}


# Whose arguments are named wherever they matter.
USED_WITH = [
    *(jax.shard_map, jax.lax.scan, optax.apply_if_finite, optax.inject_hyperparams, optax.TransformUpdateFn.__call__),
    *(optax.MultiSteps.__init__, optax.MultiStepsState),
    *(oc.clip_by, oc.norms.leaf_norm, oc.norms.global_norm),  # `record=`, `stacked=` and `include=`
]


def test_names_in_backticks_exist():
    def check(name):
        text = re.sub(r":\w+:`[^`]*`|``[^`]*``", "", text_of(name))
        quotes = [" ".join(quote.split()) for quote in re.findall(r"`([^`]+)`", text)]
        signatures = {word for quote in quotes if "->" in quote for word in re.findall(r"\w+", quote)}
        quoted = [found for quote in quotes if is_ours(found := meant(quote.partition("(")[0], name))]
        arguments = {argument for found in [PUBLIC[name], *quoted, *USED_WITH] for argument in arguments_of(found)}
        known = WORDS | FOREIGN | KEYS | arguments | signatures
        return sorted({missing for quote in quotes for missing in unknown(quote, name, known)})

    assert_none_fails(check, PUBLIC)


def unknown(quote, name, known):
    """What means nothing of a quote in a docstring: names, and arguments in calls of what does not take them."""
    if quote.endswith((".csv", ".ipynb")):  # notebooks are checked below
        return []
    if argument := re.fullmatch(r"(\w+)=(\S*)", quote):  # `max_norm=` and `max_norm=None`
        return [] if argument[1] in known else [quote]
    try:
        nodes = list(ast.walk(ast.parse(quote, mode="eval")))
    except SyntaxError:  # a formula, or a sentence
        return []
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    paths = [
        ast.unparse(node) for node in nodes if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner
    ]
    missing = [path for path in paths if not means_something(path, name, known)]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    return missing + [f"{ast.unparse(call.func)}({argument}=)" for call in calls for argument in not_taken(call, name)]


def means_something(path, name, known):
    is_variable = len(path) == 1 or {path, path.partition(".")[0]} & known
    return bool(is_variable) or meant(path, name) is not None


def meant(path, name):
    """What a path means in the docstring of `name`: something beside it, in optaxclip, in a package or in Python."""
    first, _, rest = path.partition(".")
    if first in PACKAGES:
        return get(rest, PACKAGES[first]) if rest else PACKAGES[first]
    beside = MODULES.get(name.rpartition(".")[0], oc)
    states = inspect.getmodule(PUBLIC[name])  # which are named where they are returned
    places = (beside, oc, oc.contrib, states, optax, jax, jax.lax, builtins)
    return next((found for place in places if (found := get(path, place)) is not None), None)


def get(path, start):
    for part in path.split("."):
        start = getattr(start, part, None)
    return start


def not_taken(call, name):
    """The arguments by name in a call of ours that it does not take."""
    found = meant(ast.unparse(call.func), name)
    return {keyword.arg for keyword in call.keywords} - arguments_of(found) if is_ours(found) else set()


def is_ours(found):
    return any(found is each for each in PUBLIC.values())


# The notebooks.

NOTEBOOK = re.compile(r"notebooks/\w+\.ipynb")
# Whose notebook shows something else that does the same, or what it is to be compared with.
SHOWN_AS = {
    "clip_by": "clip_by_global_norm",
    "clip_by_value": "clip",
    "contrib.arcsinh_clip": "clip",
    "contrib.centered_clip": "clipped_momentum",
    "contrib.tanh_clip": "clip",
    "per_example_global_norm_clip": "clipped_value_and_grad",
    "per_example_layer_norm_clip": "clipped_value_and_grad",
}


def test_a_notebook_that_is_named_shows_the_method():
    def check(name):
        notebooks = {place: ROOT / place for place in NOTEBOOK.findall(text_of(name))}
        shown = re.compile(rf"(?<!\w){SHOWN_AS.get(name, name.rpartition('.')[2])}\b")
        wrong = [place for place, file in notebooks.items() if not (file.is_file() and shown.search(file.read_text()))]
        return wrong or (None if notebooks or name not in TRANSFORMATIONS else "names none")

    assert_none_fails(check, PUBLIC)


# The pages and the maps.


def names_on(page):
    """The public names, below `optaxclip`, whose documentation a page has."""
    text = page.read_text()
    modules = " ".join(re.findall(r"^\.\. public:: (.*)$", text, flags=re.MULTILINE)).split()
    whole = re.findall(r"^\.\. automodule:: optaxclip\.(\w+)\n   :members:$", text, flags=re.MULTILINE)
    top = [
        name for name in oc.__all__ if getattr(PUBLIC.get(name), "__module__", "").removeprefix("optaxclip.") in modules
    ]
    return top + [f"{place}.{name}" for place in whole for name in own_names(MODULES[place])]


def test_every_public_name_is_on_one_api_page():
    pages = sorted((ROOT / "notebooks" / "api").glob("*.rst"))
    assert sorted(name for page in pages for name in names_on(page)) == sorted(PUBLIC)


def test_the_maps_name_all_there_is():
    def named(module):
        return set(re.findall(r"`(\w+)[`(.]", module.__doc__))

    assert set(oc.__all__) - named(oc) == set(CLASSES) & set(oc.__all__)
    maps = {module: own_names(module) for module in (oc.contrib, oc.norms, oc.thresholds)}
    assert [name for module, names in maps.items() for name in set(names) - named(module)] == []


def test_contrib_says_where_each_method_comes_from_as_its_docstring_does():
    text = (ROOT / "optaxclip" / "contrib" / "README.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, flags=re.MULTILINE))
    assert {f"contrib.{name}" for name in table} == {f"contrib.{name}" for name in oc.contrib.__all__} - set(CLASSES)
    references = {name: sections_of(f"contrib.{name}")["References"] for name in table}

    def check(name):
        cited, referred = (set(re.findall(r"\d{4}\.\d{5}", part)) for part in (table[name], references[name]))
        return cited ^ referred

    assert_none_fails(check, table)
