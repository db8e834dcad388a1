"""The source of the site: a folder with every page, those that are written and those that are made.

README.md is the home page. A file outside of ``docs`` that a page links to becomes part of the site too: a page if it
is Markdown, a picture, else a text. `reference` makes pages from docstrings, `commands` from the parser.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path

import commands
import reference

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = Path(__file__).with_name("mkdocs.yml")
HOME, WRITTEN, OTHERS = ROOT / "README.md", ROOT / "docs", "files"
FENCED = re.compile(r"(^```.*?^```$)", flags=re.MULTILINE | re.DOTALL)
TARGET = re.compile(r"(?<=\]\()(?![a-z]+:|#)[^)\s#]+")  # of a relative link, without its anchor
ENTRY = re.compile(r"^( +)- (.+): (\S+/)$", flags=re.MULTILINE)  # of the navigation, for a folder of made pages
NAMED = re.compile(r"^ +- (\S+\.md)$", flags=re.MULTILINE)  # a page in the navigation


def write_source(folder: Path) -> Path:
    """Write the settings of the generator, the pages and the packages into an empty folder; return the settings."""
    reference.lay_out_packages(ROOT, folder / "packages")
    made = {**reference.pages(folder / "packages"), **commands.pages()}
    for uri, text in made.items():
        write(folder / "pages" / uri, text)
    for path in sorted(linked_files([HOME, *WRITTEN.rglob("*.md")])):
        destination = folder / "pages" / uri_of(path)
        if path.suffix == ".md":
            write(destination, with_links_of_the_site(path))
        else:
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, destination)
    shutil.copytree(SETTINGS.with_name("theme"), folder / "theme")
    settings = ENTRY.sub(lambda entry: with_pages_of_a_folder(entry, list(made)), SETTINGS.read_text(encoding="utf-8"))
    check_navigation(NAMED.findall(settings), {*map(uri_of, WRITTEN.rglob("*.md")), uri_of(HOME), *made})
    return write(folder / "mkdocs.yml", settings)


def check_navigation(named: list[str], pages: set[str]) -> None:
    """Check that every page stands in the navigation, once.

    Raises:
        ValueError: one is missing, there are two of it, or there is no such page.
    """
    missing, unknown = sorted(pages - {*named}), sorted({*named} - pages)
    twice = sorted({uri for uri in named if named.count(uri) > 1})
    if missing or unknown or twice:
        found = f"missing {missing}, without a page {unknown}, more than once {twice}"
        raise ValueError(f"website/mkdocs.yml, nav: expected every page once, got {found}; edit that list")


def write(path: Path, text: str) -> Path:
    """Write a text, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def linked_files(pages: list[Path]) -> set[Path]:
    """Return some pages, and the files of the repository to which they link."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    linked = {(page.parent / target).resolve() for page, text in texts.items() for target in TARGET.findall(text)}
    return {*pages, *(path for path in linked if path.is_file() and path.is_relative_to(ROOT))}


def with_links_of_the_site(page: Path) -> str:
    """Return the text of a page; its links lead to where their targets are within the site."""
    folder = posixpath.dirname(uri_of(page))

    def within_site(target: re.Match[str]) -> str:
        return posixpath.relpath(uri_of((page.parent / target[0]).resolve()), folder or ".")

    parts = FENCED.split(page.read_text(encoding="utf-8"))
    return "".join(part if FENCED.match(part) else TARGET.sub(within_site, part) for part in parts)


def uri_of(path: Path) -> str:
    """Return the place in the site of a file of the repository."""
    if path == HOME:
        return "index.md"
    if path.is_relative_to(WRITTEN):
        return path.relative_to(WRITTEN).as_posix()
    shown = path if path.suffix in (".md", ".png") else path.with_name(f"{path.name}.txt")
    return f"{OTHERS}/{shown.relative_to(ROOT).as_posix()}"


def with_pages_of_a_folder(entry: re.Match[str], made: list[str]) -> str:
    """Return an entry of the navigation with the made pages of the folder that it names below it."""
    indent, title, folder = entry.groups()
    pages = [f"{indent}    - {uri}" for uri in made if f"{posixpath.dirname(uri)}/" == folder]
    return "\n".join([f"{indent}- {title}:", *pages])
