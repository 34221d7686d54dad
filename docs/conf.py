"""How the documentation is built: `make docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from figures import draw_all

import voxloom

project = "voxloom"
author = copyright = "The voxloom developers"  # noqa: A001 - the name that Sphinx has for it
release = version = voxloom.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "voxloom"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "undoc-members": False, "exclude-members": "__init__"}
napoleon_use_rtype = False
suppress_warnings = ["myst.header", "ref.python"]
add_module_names = False

draw_all(Path(__file__).parent / "_figures")


def _as_markdown_names(app, what, name, obj, options, lines):
    """Let single backticks of docstrings be code."""
    import re

    lines[:] = [re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line) for line in lines]


def setup(app):
    """Connect what turns docstrings into reStructuredText."""
    app.connect("autodoc-process-docstring", _as_markdown_names)
