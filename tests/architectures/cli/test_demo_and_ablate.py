"""``trifuse demo`` and ``trifuse ablate`` hand their arguments to the networks."""

from __future__ import annotations

from pathlib import Path

from trifuse.architectures.cli.main import main


def test_demo_and_ablation_are_called_with_their_words(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "trifuse.architectures.fias.demo.run_demo", lambda out, **options: asked.append((out, options["seed"]))
    )
    assert main(["demo", "fias", "--seed", "4"]) == 0

    def ablate(out, *, seeds, epochs, cases, command):
        asked.append((seeds, epochs, cases, command))
        (tmp_path / "table.md").write_text("| a |")
        return tmp_path / "table.md"

    monkeypatch.setattr("trifuse.architectures.fias.ablate.ablate", ablate)
    words = ["ablate", "fias", "--out", "x", "--seeds", "2", "--epochs", "3", "--cases", "5"]
    assert main(words) == 0
    assert asked == [(Path("demo/fias"), 4), (2, 3, 5, ["trifuse", *words])]
