"""The last look at a built site: what leads nowhere, and what would be loaded from another host, is found."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAD = '<link rel="stylesheet" href="style.css"><script src="./code.js"></script>'


def dead_links(site):
    spec = importlib.util.spec_from_file_location("website_links", ROOT / "website" / "links.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.dead_links(site)


@pytest.fixture
def site(tmp_path):
    """A site of two pages whose links all lead somewhere."""
    pages = {
        "index.html": f'{HEAD}<h1 id="top">x</h1><a href="below/page.html#part%202">y</a><a href="#top">z</a>',
        "below/page.html": '<h2 id="part 2">x</h2><a href="../index.html"><img src="../picture.png"></a>'
        '<a href="https://example.org/nowhere">elsewhere</a><a href="mailto:x@example.org">write</a>',
    }
    for name in ("style.css", "code.js", "picture.png"):
        (tmp_path / name).touch()
    (tmp_path / "below").mkdir()
    for name, text in pages.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_a_site_whose_links_lead_somewhere(site):
    assert dead_links(site) == []


@pytest.mark.parametrize(
    ("tag", "target"),
    [
        ('<a href="gone.html">x</a>', "gone.html"),
        ('<a href="index.html#gone">x</a>', "index.html#gone"),
        ('<a href="#gone">x</a>', "#gone"),
        ('<a href="code.js#gone">x</a>', "code.js#gone"),
        ('<a href="below">a folder</a>', "below"),
        ('<a href="/index.html">x</a>', "/index.html"),
        ('<img src="gone.png">', "gone.png"),
        ('<script src="https://example.org/code.js"></script>', "https://example.org/code.js"),
        ('<link rel="stylesheet" href="//example.org/style.css">', "//example.org/style.css"),
    ],
)
def test_what_leads_nowhere_or_is_loaded_from_elsewhere(site, tag, target):
    page = site / "index.html"
    page.write_text(page.read_text(encoding="utf-8") + tag, encoding="utf-8")
    assert dead_links(site) == [f"index.html: {target}"]
