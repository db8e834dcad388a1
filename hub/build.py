"""Build the operators as a package for the Hugging Face `kernels` loader: ``python hub/build.py --out build/hub``.

The package is `trifuse.kernels` without its tools for tests, and `layers.py`::

    README.md, LICENSE                     the card of the repository, and the licence
    build/torch-universal/metadata.json    name, id, licence, and the digest of every file beside it
    build/torch-universal/__init__.py      the catalogue, whose names are resolved when they are first used
    build/torch-universal/trifuse/         for older loaders, which look for a folder of the package's name

A process may load several builds, each under its id, beside an installed trifuse. So imports within the package become
relative, and operators are registered in a namespace that is the id, which the sources alone decide.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import tempfile
from base64 import b64encode
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
NAME, LICENSE = "trifuse", "Apache-2.0"
VERSION = 0  # raised when an operator changes its signature; 0 says that they may still change
VARIANT = "torch-universal"  # Python alone: one build for all devices
LEFT_OUT = ("testing", "tested_versions.py", "__pycache__")
ITS_NAME = re.compile(r"^if __name__ != .*?^    \)\n\n", flags=re.MULTILINE | re.DOTALL)  # loaders choose another
LOADED_AT_ONCE = "\nfrom . import layers  # noqa: E402, F401  (what the loader loads is about to be used)\n"


def sources() -> dict[str, str]:
    """Return the files of the package as they are in this repository, by their path in the package."""
    files = [path for path in (ROOT / "kernels").rglob("*") if path.suffix in (".py", ".typed")]
    named = {path.relative_to(ROOT / "kernels").as_posix(): path for path in sorted(files)}
    kept = {name: path for name, path in named.items() if not set(PurePosixPath(name).parts) & set(LEFT_OUT)}
    kept["layers.py"] = ROOT / "hub" / "layers.py"
    kept[f"{NAME}/__init__.py"] = ROOT / "hub" / "compatibility.py"
    kept["LICENSE"] = ROOT / "LICENSE"
    return {name: path.read_text(encoding="utf-8") for name, path in kept.items()}


def identifier(files: dict[str, str]) -> str:
    """Return the name under which this content is loaded, and its operators are registered."""
    content = json.dumps([sorted(files.items()), Path(__file__).read_text(encoding="utf-8")]).encode()
    return f"_{NAME}_{hashlib.sha256(content).hexdigest()[:8]}"


def rewritten(name: str, text: str, id: str) -> str:
    """Return a file of the package as it is under its id: imports relative, names of the namespace replaced."""
    if not name.endswith(".py"):
        return text
    dots = "." * len(PurePosixPath(name).parts)
    text = re.sub(r"^( *from )trifuse\.kernels\.?(\S*)(?= import )", rf"\1{dots}\2", text, flags=re.MULTILINE)
    text = text.replace("torch.ops.trifuse", f"torch.ops.{id}")
    if name == "namespace.py":
        text = _replaced(text, 'NAMESPACE = "trifuse"', f'NAMESPACE = "{id}"')
    if name == "__init__.py":
        text = _replaced(text, ITS_NAME, "") + LOADED_AT_ONCE
    return text.replace("trifuse.kernels", id)


def _replaced(text: str, old: str | re.Pattern[str], new: str) -> str:
    replaced, places = re.subn(old, new, text)
    assert places == 1, old
    return replaced


def metadata(files: dict[str, str], id: str) -> dict:
    """Return what the loader reads of a package before it imports anything."""
    digests = {name: b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in files.items()}
    return {
        "name": NAME,
        "id": id,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": "cuda"},
        "digest": {"algorithm": "sha256", "files": dict(sorted(digests.items()))},
    }


def build(out: Path) -> Path:
    """Write the package into a folder, in the place of an older build, and return the folder of its variant.

    Raises:
        FileExistsError: the folder holds something else.
    """
    found = {path.relative_to(out).as_posix() for pattern in ("*", "build/*") for path in out.glob(pattern)}
    foreign = sorted(found - {"README.md", "LICENSE", "build", f"build/{VARIANT}"})
    if foreign:
        raise FileExistsError(
            f"{out}: expected no folder, or one that an earlier build wrote, got one that holds {', '.join(foreign)}; "
            "choose another folder with --out"
        )
    original = sources()
    id = identifier(original)
    files = {name: rewritten(name, text, id) for name, text in original.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        made = Path(scratch, "made")
        for name, text in files.items():
            _write(made / "build" / VARIANT / name, text)
        _write(made / "build" / VARIANT / "metadata.json", json.dumps(metadata(files, id), indent=2) + "\n")
        _write(made / "README.md", (ROOT / "hub" / "card.md").read_text(encoding="utf-8").replace("{id}", id))
        _write(made / "LICENSE", original["LICENSE"])
        if out.exists():
            shutil.move(out, Path(scratch, "old"))
        shutil.move(made, out)
    return out / "build" / VARIANT


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hub", help="the folder of the package")
    variant = build(parser.parse_args().out)
    print(f"{variant.parents[1]}: load it with kernels.get_local_kernel(Path({str(variant.parents[1])!r}))")


if __name__ == "__main__":
    main()
