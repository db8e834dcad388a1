"""``trifuse demo`` and ``trifuse ablate`` hand their arguments to the networks."""

from __future__ import annotations

import re
from inspect import signature
from pathlib import Path

import pytest

from trifuse.architectures.cli.main import main
from trifuse.architectures.runs.registry import experiment
from trifuse.architectures.taff_unet.phantoms import ABLATIONS


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


def test_what_is_not_said_is_left_to_the_network(monkeypatch, tmp_path):
    asked = []

    def ablate(out, **options):
        asked.append(options)
        (tmp_path / "table.md").write_text("| a |")
        return tmp_path / "table.md"

    monkeypatch.setattr("trifuse.architectures.taff_unet.ablate.ablate", ablate)
    monkeypatch.setattr("trifuse.architectures.taff_unet.demo.run_demo", lambda out, **options: asked.append(options))
    words = [
        ["ablate", "taff_unet", "--out", "x"],
        ["ablate", "taff_unet", "--out", "x", "--phantom", "ambiguous", "--seeds", "2", "--jobs", "2"],
        ["demo", "taff_unet", "--phantom", "ambiguous"],
        ["demo", "taff_unet"],
    ]
    for each in words:
        assert main(each) == 0
    said = [{name: value for name, value in options.items() if name != "command"} for options in asked]
    demo = {"seed": 0, "overwrite": False}
    assert said == [{}, {"phantom": "ambiguous", "seeds": 2, "jobs": 2}, {"phantom": "ambiguous", **demo}, demo]


@pytest.mark.parametrize(("network", "cases", "code"), [("fias", 2, 2), ("dino_unet", 1, 2), ("taff_unet", 1, 3)])
def test_l2_an_ablation_of_too_few_cases_is_refused_in_words(network, cases, code, tmp_path, capsys):
    assert main(["ablate", network, "--out", str(tmp_path / "out"), "--cases", str(cases)]) == code
    assert re.search(r"phantom: .*expected at least (3 cases|one)", capsys.readouterr().err)


def test_a_cohort_of_ones_own_has_as_many_cases_as_it_has(tmp_path, capsys):
    words = ["ablate", "taff_unet", "--out", str(tmp_path / "out"), "--cohort", str(tmp_path)]
    assert main([*words, "--cases", "4"]) == 2
    assert "expected no cases beside it, got 4" in capsys.readouterr().err
    assert main([*words, "--phantom", "ambiguous"]) == 2
    assert "expected no phantom beside it, got 'ambiguous'" in capsys.readouterr().err


def test_the_help_says_what_an_ablation_does():
    """Numbers that ``--help`` shows are the functions' own defaults, or those of their phantoms."""
    for known in (experiment("fias"), experiment("dino_unet")):
        defaults = signature(known.load(known.ablation.run)).parameters
        for name in ("seeds", "epochs", "cases"):
            assert getattr(known.ablation, name) == str(defaults[name].default)
    shown = experiment("taff_unet").ablation
    for name in ("seeds", "epochs", "cases"):
        easy, ambiguous = (getattr(ABLATIONS[phantom], name) for phantom in ("easy", "ambiguous"))
        assert getattr(shown, name) == f"{easy}; ambiguous: {ambiguous}"
