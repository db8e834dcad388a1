"""Which links of a built site lead nowhere, or to another host for something that a page needs to be shown."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

NEEDED = {"link": "href", "script": "src", "img": "src", "source": "src", "iframe": "src"}


class Page(HTMLParser):
    """The anchors of a page, where its links lead, and what it needs to be shown."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.needed: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag names."""
        named = {name: value for name, value in attrs if value}
        self.anchors |= {named[name] for name in ("id", "name") if name in named}
        if tag == "a" and "href" in named:
            self.links.append(named["href"])
        if NEEDED.get(tag) in named and named.get("rel") not in ("next", "prev", "canonical"):
            self.needed.append(named[NEEDED[tag]])


def dead_links(site: Path) -> list[str]:
    """Return the page and the target of every link of a site that leads to no file, or to no anchor of its page."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    dead = []
    for path, page in pages.items():
        for target in (*page.links, *page.needed):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                leads_somewhere = target in page.links
            else:
                file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                anchors = pages[file].anchors if file in pages else set()
                leads_somewhere = file.is_file() and (not parts.fragment or unquote(parts.fragment) in anchors)
            if not leads_somewhere:
                dead.append(f"{path.relative_to(site.resolve())}: {target}")
    return dead
