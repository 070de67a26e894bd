"""The site's settings for Sphinx: `sphinx-build -W docs docs/_build/html` builds it.

The pages are Markdown files that GitHub shows too, so their links are paths in the repository. `relinked` makes of them
links to pages of the site, or to GitHub for files that are no pages. LaTeX becomes MathML at build time, and no page
loads anything from another host.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

import tomllib
import typer
from docutils import nodes
from math_core import LatexToMathML
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.inspect import stringify_signature
from typer.cli import get_docs_for_click

import jfbfast
from jfbfast.cli import app as command_line

ROOT = Path(__file__).resolve().parent.parent
FOLDER = os.environ.get("JFBFAST_DOCS_VERSION", "latest")  # of this build on the site: latest, or a tag such as v0.1.0
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
REPOSITORY = URLS["Source"]
COLAB = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
REVISION = "main" if FOLDER == "latest" else FOLDER

project = "jfbfast"
author = "The jfbfast authors"
release = version = jfbfast.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "tutorials"]
default_role = "py:obj"  # `Anderson` in a docstring is a link
smartquotes_action = "D"  # dashes only: quotes in docstrings are code

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # README.md is included from its second heading on

autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
add_module_names = False
python_display_short_literal_types = True

html_theme = "furo"
html_title = f"jfbfast {release}"
html_static_path = ["_static"]
html_favicon = "_static/icon.svg"
html_css_files = ["site.css"]
html_js_files = ["versions.js"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_math_renderer = "mathml"
html_theme_options = {"top_of_page_buttons": []}  # their sources are on GitHub, except for the tutorials
templates_path = ["_templates"]
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/versions.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
copybutton_exclude = ".linenos, .gp, .go"  # prompts and outputs

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,
    "min_reported_time": float("inf"),  # times depend on the machine
    "show_signature": False,
    "reference_url": {"jfbfast": None},  # names in the code are links to the reference
    "first_notebook_cell": "%pip install -q 'jfbfast[train]' deepinv",
    "within_subsection_order": "FileNameSortKey",
}

linkcheck_anchors = False  # GitHub adds its anchors in the browser
linkcheck_timeout = 30
linkcheck_retries = 3
linkcheck_allowed_redirects = {r".*": r".*"}
linkcheck_ignore = [
    rf"{REPOSITORY}.*",  # of the commit that is built: `relinked` has found the file
    rf"{COLAB}.*",  # the notebooks of this build
    rf"{URLS['Documentation']}.*",
]

PAGES = {"README.md": "/index.md", "CONTRIBUTING.md": "/contributing.md", "CHANGELOG.md": "/changelog.md"}
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
latex = LatexToMathML()


def relinked(text: str, folder: Path) -> str:
    """The Markdown ``text`` of a file in ``folder``, with links to the site's pages, or to GitHub for other files.

    The link [docs/method.md](docs/method.md) gets the title of that page. Links to files that do not exist stay as
    they are, and Sphinx warns.
    """

    def link(found: re.Match[str]) -> str:
        words, path, anchor = found[1], (folder / found[2]).resolve(), found[3] or ""
        if not path.exists() or not path.is_relative_to(ROOT):
            return found[0]
        name = path.relative_to(ROOT).as_posix()
        if name in PAGES:
            target = PAGES[name]
        elif name == "docs/tutorials":
            target = "/gallery/index.rst"
        elif page := re.fullmatch(r"docs/(.*\.(md|png|jpg)|tutorials/plot_.*\.py)", name):
            target = "/" + re.sub(r"tutorials/(.*)\.py", r"gallery/\1.rst", page[1])
        else:
            target = f"{REPOSITORY}/{'tree' if path.is_dir() else 'blob'}/{REVISION}/{name}"
        if words.endswith(".md") and target.startswith("/"):
            words = ""
        return f"[{words}]({target}{anchor})"

    return LINK.sub(link, text)


def commands() -> str:
    """What ``jfbfast COMMAND --help`` prints for all commands, as Markdown."""
    command: Any = typer.main.get_command(command_line)
    found = get_docs_for_click(obj=command, ctx=typer.Context(command), name="jfbfast", title="The command line")
    found = re.sub(r"(?m)^(#+) `(.*)`$", r"\1 \2", found)
    found = re.sub(r"(?<![`\w-])(--[a-z]+(-[a-z]+)*)", r"`\1`", found)
    return re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", found)  # cut short, and the contents at the side have them


def read_page(app: Sphinx, page: str, content: list[str]) -> None:
    path = Path(app.env.doc2path(page))
    if page == "api/command_line":
        content[0] = commands()
    elif path.suffix == ".md":
        content[0] = relinked(content[0], path.parent)
    elif page.startswith("gallery/plot_"):
        notebook = f"{COLAB}/blob/gh-pages/{FOLDER}/{page}.ipynb"
        content[0] = content[0].replace(f"{URLS['Documentation']}/latest/", "../")
        content[0] = content[0].replace(
            "to download the full example code.", f"to download this tutorial, or `run it in Colab <{notebook}>`__.", 1
        )


def read_included(app: Sphinx, path: Path, page: str, content: list[str]) -> None:
    content[0] = relinked(content[0], ROOT / "docs" / path.parent)


def constructor(app: Sphinx, what: str, name: str, thing: Any, *rest: Any) -> tuple[str, str] | None:
    """The signature of a class with a __new__ of its own, which autodoc would show in place of __init__'s."""
    if what == "class" and "__new__" in dir(thing) and thing.__new__ is not object.__new__:
        return stringify_signature(inspect.signature(thing), show_annotation=False), ""
    return None


def is_field(app: Sphinx, what: str, name: str, thing: Any, *rest: Any) -> bool | None:
    """Leave out the fields of a named tuple, which its docstring explains."""
    return True if inspect.ismemberdescriptor(thing) or type(thing).__name__ == "_tuplegetter" else None


def by_last_name(app: Sphinx, env: BuildEnvironment, node: Any, content: nodes.Element) -> nodes.Element | None:
    """Resolve `LeastSquares` and jfbfast.solvers.solution.Status, if one documented name ends so."""
    domain, last = env.domains.python_domain, node.get("reftarget", "").rpartition(".")[2]
    names = [name for name, found in domain.objects.items() if name.rpartition(".")[2] == last and not found.aliased]
    if node.get("refdomain") != "py" or len(names) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", names[0], node, content)


def copy_notebooks(app: Sphinx, error: Exception | None) -> None:
    """Put the notebooks where the links to Colab say: beside the tutorials' pages."""
    if error is None and app.builder.name == "html":
        for path in Path(app.srcdir, "gallery").glob("*.ipynb"):
            Path(app.outdir, "gallery", path.name).write_bytes(path.read_bytes())


def inline_mathml(writer: Any, node: nodes.Element) -> None:
    writer.body.append(latex.convert_with_local_state(node.astext(), displaystyle=False))
    raise nodes.SkipNode


def block_mathml(writer: Any, node: nodes.Element) -> None:
    writer.body.append(f'<div class="math">{latex.convert_with_local_state(node.astext(), displaystyle=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (inline_mathml, None), (block_mathml, None))
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
    app.connect("autodoc-process-signature", constructor)
    app.connect("autodoc-skip-member", is_field)
    app.connect("missing-reference", by_last_name)
    app.connect("build-finished", copy_notebooks)
