"""Build the documentation site: its source, then the pages, then a look at every link of every page.

    python website/build.py [--out build/site]

An earlier site is replaced. A warning of the generator, and a link that leads nowhere, end the build.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "website"))  # Python with safe paths does not
OF_DOCSTRINGS = "griffe: "  # begins a warning that the generator passes on, and does not count
FIRST = "packages/trifuse/__init__.py"  # of the source, before anything in it can go wrong


def build(out: Path, source: Path) -> None:
    """Build the site in a folder; an earlier site in that folder, and its source, are replaced."""
    from links import dead_links
    from source import write_source

    clear(out, "search.json")
    clear(source, FIRST)
    settings = write_source(source)
    generate(settings, source / "packages")
    made = source / "site"
    (made / "404.html").unlink()  # for a server alone: its links hold nowhere else
    if dead := dead_links(made):
        sys.exit("\n".join(["links that lead nowhere:", *dead]))
    shutil.move(made, out)


def clear(folder: Path, sign: str) -> None:
    """Remove what an earlier build left in a folder, known by one of its files; anything else in it is an error."""
    if folder.exists() and any(folder.iterdir()) and not (folder / sign).is_file():
        sys.exit(f"{folder}: expected no folder, or an earlier build with its {sign}; got other files; choose another")
    shutil.rmtree(folder, ignore_errors=True)


def generate(settings: Path, folder: Path) -> None:
    """Run the generator in the folder of the packages, from which files of code are named; a warning is an error."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(settings)]
    result = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode or OF_DOCSTRINGS in result.stdout:
        sys.exit(f"{result.stdout}\nthe generator warns of what stands above")


def main() -> None:
    """Build the site that the command line asks for."""
    parser = argparse.ArgumentParser(description="Build the documentation site.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site", help="folder of the site (build/site)")
    parser.add_argument("--source", type=Path, default=ROOT / "build" / "docs", help="of its source (build/docs)")
    arguments = parser.parse_args()
    if missing := [name for name in ("zensical", "mkdocstrings", "griffe") if find_spec(name) is None]:
        parser.error(f"needs {', '.join(missing)}, not installed here; run: pip install '.[docs]'")
    build(arguments.out.resolve(), arguments.source.resolve())
    print(f"open {arguments.out / 'index.html'}")


if __name__ == "__main__":
    main()
