"""The documentation site builds without a warning, loads nothing, and its pages have content."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from xml.etree import ElementTree

import pytest
from helpers.paths import ROOT

import tttjax


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={folder}"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # an advertisement on stderr
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    return folder


@pytest.fixture(scope="module")
def index(site):
    """Text of the search index by location."""
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    return {entry["location"]: entry["text"] for entry in entries}


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_can_be_found(index):
    docs = ROOT / "docs"
    pages = [path.relative_to(docs) for end in ("md", "ipynb") for path in docs.rglob(f"*.{end}")]
    assert len(pages) > 20
    for page in pages:
        url = page.parent if page.stem == "README" else page.with_suffix("")
        assert any(place.startswith(f"{url}/") and text for place, text in index.items()), url
    assert "gradient step on part of its own weights" in index[""]  # README.md


def test_the_public_api_is_described(site, index):
    page = (site / "reference" / "public" / "index.html").read_text()
    for name in tttjax.__all__:
        assert re.search(rf'id="tttjax\.([a-z_]+\.)*{name}"', page), name
    adapt = index["reference/ttt/#tttjax.ttt.inner_loop.adapt"]
    assert "exact_chunks: int | None = None" in adapt
    assert "<li><code>lr</code>: as in <code>update</code>.</li>" in adapt
    state = index["reference/ttt/#tttjax.ttt.inner_loop.ReadState"]
    assert "<li><code>fast</code>: W_i</li>" in state
    assert len([place for place in index if place.startswith("reference/")]) > 200


def test_linked_files_of_the_repository_have_pages(site):
    page = (site / "results" / "preregistration" / "index.html").read_text()
    assert 'href="../../experiments/toy_on_books.py/"' in page
    source = (site / "experiments" / "toy_on_books.py" / "index.html").read_text()
    assert "def " in re.sub("<[^>]+>", "", source)
    assert 'href="concepts/"' in (site / "index.html").read_text()


def test_pages_load_nothing_from_elsewhere(site):
    loaded = re.compile(
        r"""<(?:script|img|link|iframe|source)[^>]*(?:src|href)=["']?(?:https?:)?//"""
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    assert [page for page in pages if loaded.search(page.read_text())] == []


def test_links_become_those_of_the_site(hooks):
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="results/README.md"))
    text = "[a](../data.md#speed) [b](../../launch/test.sh) [c](none.md) [data.md](../data.md)"
    assert hooks.on_page_markdown(text, page, None, None) == (
        "[a](../data.md#speed) [b](../launch/test.sh.md) [c](none.md) [Data](../data.md)"
    )


def test_parameters_in_docstrings_become_lists(hooks):
    text = "One line.\n\nlr: a rate. a, b: more,\nthan a line.\nReturns all.\nother: text"
    items = "- `lr`: a rate.\n- `a, b`: more,\n  than a line."
    expected = f"One line.\n\n\n{items}\n\nReturns all.\nother: text"
    assert hooks.as_list(text, {"lr", "a", "b"}) == expected


def test_the_diagram_suits_light_and_dark():
    path = ROOT / "docs" / "inner_loop.svg"
    root = ElementTree.parse(path).getroot()
    style = root.find("{*}style").text
    used = {name for node in root.iter() for name in node.get("class", "").split()}
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    assert used
    for name in used:
        assert f".{name} {{" in light
    for name in used - {"strong", "small", "left"}:
        assert f".{name} {{" in dark
    assert path.stat().st_size < 10_000
    assert not re.search(r"href=|url\((?!#)|<script|@import", path.read_text())
    for page in ("README.md", "docs/concepts.md"):
        assert "inner_loop.svg)" in (ROOT / page).read_text()


def test_a_notebook_becomes_a_page(hooks):
    code = {"cell_type": "code", "source": ["print(1)"]}
    code["outputs"] = [
        {"output_type": "stream", "name": "stdout", "text": ["1\n"]},
        {"output_type": "display_data", "data": {"image/png": "QUJD\n", "text/plain": "<Figure>"}},
    ]
    page = hooks.notebook_page({"cells": [{"cell_type": "markdown", "source": "# Title"}, code]})
    image = '<img alt="output of the cell above" src="data:image/png;base64,QUJD">'
    assert page == f"# Title\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n{image}\n"
