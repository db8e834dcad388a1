"""What `make docs` asks for, and what it does not touch; and the pictures that stand in the pages."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WEBSITE = ROOT / "website"


def test_a_missing_extra_is_named_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        sys, "argv", ["build.py", "--out", str(tmp_path / "site"), "--source", str(tmp_path / "source")]
    )
    with pytest.raises(SystemExit):
        runpy.run_path(str(WEBSITE / "build.py"), run_name="__main__")
    assert "needs zensical, mkdocstrings, griffe, not installed here; run: pip install" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sign", ["search.json", "packages/trifuse/__init__.py"])
def test_a_folder_of_other_files_is_left_alone(tmp_path, sign):
    """Only an earlier build, which is known by a file of it, is replaced."""
    clear = runpy.run_path(str(WEBSITE / "build.py"))["clear"]
    mine, earlier = tmp_path / "mine", tmp_path / "earlier"
    for folder, name in ((mine, "thesis.txt"), (earlier, sign)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    with pytest.raises(SystemExit, match="mine: expected no folder, or an earlier build"):
        clear(mine, sign)
    clear(earlier, sign)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_pictures_are_those_of_the_demos_made_smaller(tmp_path):
    from PIL import Image

    module = runpy.run_path(str(WEBSITE / "pictures.py"))
    for found, _ in module["PICTURES"].values():
        (tmp_path / found).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (2000, 500), "orange").save(tmp_path / found)
    module["take"](tmp_path, tmp_path / "pictures")
    for name, (_, width) in module["PICTURES"].items():
        taken = Image.open(tmp_path / "pictures" / name)
        assert taken.size == (width, width // 4)
        assert taken.convert("RGB").getpixel((9, 9)) == (255, 165, 0)
        assert (ROOT / "docs" / "pictures" / name).stat().st_size < 200_000
