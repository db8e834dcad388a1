"""The documentation site as `make docs` builds it: every page, every exported name, every option of every command."""

from __future__ import annotations

import argparse
import html
import importlib
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from shared_by_workers import folder_of_run, one_at_a_time

from trifuse.architectures.cli.arguments import commands_below
from trifuse.architectures.cli.main import build_parser
from trifuse.architectures.runs.registry import NETWORKS

if find_spec("zensical") is None or find_spec("mkdocstrings") is None:
    pytest.skip("zensical or mkdocstrings is missing: pip install 'trifuse[docs]'", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
WEBSITE = ROOT / "website"
REFERENCE = {  # the package, and the pages of its reference
    "trifuse.kernels": "trifuse.kernels",
    "trifuse.kernels.testing": "trifuse.kernels.testing",
    "trifuse.blocks": "trifuse.blocks",
    **{f"trifuse.architectures.{name}": "networks" for name in NETWORKS},
}


def files_of_the_tree():
    """Return the files among which a build might leave some, and their lengths."""
    folders = (ROOT / name for name in ("docs", "website", "kernels", "blocks", "architectures", ".cache"))
    paths = [*ROOT.glob("[a-z]*"), *(path for folder in folders for path in folder.rglob("*"))]
    return {path: path.stat().st_size for path in paths if path.is_file() and path.suffix != ".pyc"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built once in a run of pytest; a warning or a dead link fails the build."""
    folder = folder_of_run(tmp_path_factory) / "website"
    folder.mkdir(exist_ok=True)
    with one_at_a_time(folder / "lock"):
        if not (folder / "site").exists():
            build(folder)
    return folder / "site"


def build(folder):
    """Build the site in a folder, and see that it leaves nothing elsewhere."""
    before = files_of_the_tree()
    command = [sys.executable, WEBSITE / "build.py", "--out", folder / "site", "--source", folder / "source"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    assert files_of_the_tree() == before


def text_of(path):
    """Return the words of a page, without its tags and the source code of what it describes."""
    inside = path.read_text(encoding="utf-8").split("<article")[1].split("</article>")[0]
    inside = re.sub(r"<details.*?</details>", "", inside, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", inside)).split())


def test_every_written_page_is_there(site):
    for path in (ROOT / "docs").rglob("*.md"):
        title = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
        page = site / path.relative_to(ROOT / "docs").with_suffix(".html")
        assert title.replace("`", "") in text_of(page), page
    assert "Fused Triton kernels" in text_of(site / "index.html")


@pytest.mark.parametrize("package", REFERENCE)
def test_every_exported_name_is_in_the_reference(site, package):
    pages = "".join(path.read_text(encoding="utf-8") for path in (site / REFERENCE[package]).glob("*.html"))
    for name in {*importlib.import_module(package).__all__} - {"EXPERIMENT"}:
        assert re.search(rf'id="trifuse\.[\w.]*\.{name}"', pages), name


def test_docstrings_are_shown_as_they_are_meant(site):
    page = site / "trifuse.kernels" / "mutation_loss.html"
    assert "from trifuse.kernels import mutation_loss, mutation_loss_reference" in text_of(page)
    assert "where the target is not on a CPU: a GPU is not made to wait for that check." in text_of(page)
    for folder in {*REFERENCE.values()}:
        for path in (site / folder).glob("*.html"):
            prose = re.sub(r"<(code|pre).*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            assert not re.search(r"::</p>|<blockquote>|<strong>[^<]*[,^]", prose), path


@pytest.mark.parametrize("parser", commands_below(build_parser()), ids=lambda parser: parser.prog)
def test_every_option_of_a_command_is_there_with_what_it_means(site, parser):
    text = text_of(site / "commands" / f"{parser.prog.split()[1]}.html")
    formatter = argparse.HelpFormatter(parser.prog)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
            continue
        assert all(option in text for option in action.option_strings)
        meaning = " ".join(formatter._expand_help(action).split()) if action.help else ""
        assert meaning in text, action.option_strings or action.dest


def test_search_finds_pages_names_and_options(site):
    items = json.loads((site / "search.json").read_text(encoding="utf-8"))["items"]
    found = {item["title"] for item in items}
    assert {"trifuse", "temporal_film_gate", "TemporalFiLMGate", "trifuse train fias", "trifuse doctor"} <= found
    assert (site / "search.js").read_text(encoding="utf-8").startswith("var __index = ")
    assert (site / "javascripts" / "iframe-worker.js").is_file()


def test_a_file_that_a_page_links_to_is_part_of_the_site(site):
    for path in ("benchmarks/results/torture.html", "benchmarks/results/scaling.cpu.png", "blocks/plain_unet.py.txt"):
        assert (site / "files" / path).is_file(), path


@pytest.fixture
def source(monkeypatch):
    """The module that gathers the pages."""
    monkeypatch.syspath_prepend(WEBSITE)
    return importlib.import_module("source")


@pytest.mark.parametrize(
    ("named", "what"),
    [
        (["a.md"], r"missing \['b.md'\]"),
        (["a.md", "b.md", "c.md"], r"without a page \['c.md'\]"),
        (["a.md", "b.md", "b.md"], r"more than once \['b.md'\]"),
    ],
)
def test_a_page_stands_in_the_navigation_once(source, named, what):
    source.check_navigation(["b.md", "a.md"], {"a.md", "b.md"})
    with pytest.raises(ValueError, match=what):
        source.check_navigation(named, {"a.md", "b.md"})
