"""The pages: links and named files exist, code compiles and prints what is shown, the reference is complete."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from itertools import pairwise, zip_longest
from pathlib import Path

import pytest

import src
from scripts import figures, layers

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("*.md")), ROOT / "launch/README.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"(?<![\w./<-])((?:docs|launch|scripts|src|tests)/[\w./-]*\w(?:\.\w+|/)?)(?![\w*<])")
each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in {slug(h) for h in re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)}, target


@each_page
def test_named_files_exist(page: Path) -> None:
    for name in FILE.findall(page.read_text()):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
    for module in re.findall(r"-m (scripts[.\w]*)", page.read_text()):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{page.name} runs {module}"


@each_page
def test_python_compiles(page: Path) -> None:
    for language, code in FENCE.findall(page.read_text()):
        if language == "python":
            compile(code, str(page), "exec")


# Digests and floating-point numbers depend on the machine.
def masked(text: str) -> str:
    return re.sub(r"\b[0-9a-f]{16,}\b", "DIGEST", re.sub(r"\d\.\d{4,}(e-\d+)?", "FLOAT", text))


def examples(name: str) -> list[tuple[str, str]]:
    """Python code of a page that is directly followed by a block without language: its output."""
    text = (ROOT / name).read_text()
    fences = list(FENCE.finditer(text))
    return [
        (code[2], shown[2])
        for code, shown in pairwise(fences)
        if (code[1], shown[1]) == ("python", "") and not text[code.end() : shown.start()].strip() and shown[2][0] != "$"
    ]


SHOWN = [
    pytest.param(*example, id=f"{name}-{i}")
    for name in NAMES
    if name
    not in ("README.md", "docs/testing.md", "docs/ledger.md", "docs/simulation.md")  # snippets that are not whole
    for i, example in enumerate(examples(name))
]


@pytest.mark.slow
@pytest.mark.parametrize("code, shown", SHOWN)
def test_examples_print_what_is_shown(tmp_path: Path, code: str, shown: str) -> None:
    if "import transformers" in code:
        pytest.importorskip("transformers")
    (tmp_path / "isoshard").symlink_to(ROOT / "src", target_is_directory=True)
    (tmp_path / "src").symlink_to(ROOT / "src", target_is_directory=True)
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert masked(done.stdout) == masked(shown)


def test_the_table_of_layers_is_current() -> None:
    lines = [
        layers.ROW.format(*line).rstrip()
        for name, forward, backward in layers.rows(4)
        for line in zip_longest([name], forward, backward, fillvalue="")
    ]
    assert "\n".join(lines) in (ROOT / "docs/layers.md").read_text()


def test_every_picture_is_drawn_and_shown(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures.main(["--out", str(tmp_path)])
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in ROOT.glob("docs/figures/*")}
    pages = "".join(page.read_text() for page in PAGES)
    assert all(f"(figures/{name})" in pages for name in drawn)


REFERENCE = (ROOT / "docs/api.md").read_text()
MODULES = re.findall(r"automodule:: isoshard\.(\S+)\n   :members:", REFERENCE)


def test_the_reference_has_every_public_module_and_name() -> None:
    with_all = {
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        for path in ROOT.glob("src/**/*.py")
        if re.search(r"^__all__ =", path.read_text(), re.MULTILINE)
    } - {"__init__"}
    leaves = {"functional", "training", "generation", "checkpoint", "verification", "testing", "sharding"}
    assert with_all | leaves <= set(MODULES)
    for name in src.__all__:
        assert re.search(rf"^\| `{name}` \| {{py:\w+}}`isoshard\.\w+\.{name}` \|$", REFERENCE, re.MULTILINE), name


@pytest.mark.parametrize("module", MODULES)
def test_what_the_reference_shows_has_a_docstring(module: str) -> None:
    found = importlib.import_module(f"src.{module}")
    own = {name for name, value in vars(found).items() if getattr(value, "__module__", "") == found.__name__}
    for name in getattr(found, "__all__", {name for name in own if not name.startswith("_")}):
        value = getattr(found, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert (value.__doc__ or "").strip(), f"{module}.{name}: autodoc leaves out what has no docstring"
