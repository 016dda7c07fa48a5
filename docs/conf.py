"""Sphinx builds these pages: python -m sphinx -W --keep-going -b html docs build/docs"""

import importlib.util
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def load_checkout() -> str:
    """Import the package of this checkout as ``isoshard``, installed or not; its version."""
    package = ROOT / "src"
    spec = importlib.util.spec_from_file_location(
        "isoshard", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules["isoshard"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.__version__)


project = "isoshard"
copyright = "isoshard contributors"
version = release = load_checkout()
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"isoshard {release}"
exclude_patterns = ["figures"]

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"


def show_indented_lines_as_they_are(*event: Any) -> None:
    """Docstrings set formulas and examples apart by indenting them; to Sphinx that would be a quotation."""
    lines: list[str] = event[-1]
    starts = [i + 1 for i, (before, line) in enumerate(pairwise(lines)) if not before and line.startswith("    ")]
    for start in reversed(starts):
        previous = next((line for line in reversed(lines[:start]) if line), "")
        if not previous.startswith(("    ", "..")) and not previous.endswith("::"):
            lines[start:start] = ["::", ""]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", show_indented_lines_as_they_are)
