"""The site: `make docs`, which is `sphinx-build -c docs -W . site`. Pages are the Markdown files of the repository, so that links lead to the same places here and there."""

from typing import Any

from sphinx.ext.napoleon.docstring import GoogleDocstring

import gossamer

project, author, copyright = "gossamer", "the gossamer developers", "2026, the gossamer developers. MIT licence"
release = version = gossamer.__version__
root_doc = "docs/index"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
include_patterns = [
    "docs/**.md",
    "benchmarks/**.md",
    "recipes/README.md",
    "demo/data/README.md",
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
exclude_patterns = [".*", "site", "runs", "gossamer", "tests", "**/node_modules"]

html_theme = "furo"
html_title = f"gossamer {release}"
html_static_path = ["style"]
html_css_files = ["site.css"]
html_extra_path = ["start"]  # index.html of the folder leads to the first page
html_copy_source = False
html_show_sphinx = False
pygments_style, pygments_dark_style = "friendly", "github-dark"

suppress_warnings = ["toc.not_included"]  # tables of the benchmarks are reached by links from their pages

myst_heading_anchors = 3
myst_links_external_new_tab = False
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
toc_object_entries_show_parents = "hide"


def escape(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are read as plain text too: |x| is a magnitude and * a product, not markup."""
    lines[:] = [line.replace("|", r"\|").replace("*", r"\*") for line in lines]


def whole_text(self: GoogleDocstring, preprocess_types: bool = False) -> list[tuple[str, str, list[str]]]:
    """Returns sections are text: types stand in signatures only, so that a colon does not end one."""
    lines = self._dedent(self._consume_to_next_section())
    return [("", "", lines)] if lines else []


GoogleDocstring._consume_returns_section = whole_text


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon, which adds markup of its own
