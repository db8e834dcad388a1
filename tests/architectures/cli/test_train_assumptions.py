"""``--show-assumptions``: what a run would settle that its paper leaves open, before anything is trained."""

from __future__ import annotations

import re

import pytest
from command import run_main

from trifuse.architectures.cli.main import build_parser
from trifuse.architectures.runs.recipes import recipe_from
from trifuse.architectures.runs.registry import experiment

LINE = re.compile(r"(?P<question>.+?): .+ \(paper: .+; (?P<options>no option|--[\w. *,-]+)\)")
every_network = pytest.mark.parametrize("name", ["dino_unet", "fias", "plain_unet", "taff_unet"])


@pytest.fixture
def assumptions(tmp_path, capsys):
    """Return a function that returns the lines of a network, and sees that nothing is left behind."""

    def printed(name: str, *words: str) -> list[str]:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        arguments = ["train", name, tmp_path / "cohort", "--out", tmp_path / "run", "--show-assumptions", *words]
        code, out, err = run_main(arguments, capsys)
        assert (code, err) == (0, "")
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        head, *lines = out.splitlines()
        assert head == f"{name}, after {experiment(name).load(experiment(name).paper)}: {len(lines)} assumptions"
        assert [line for line in lines if not LINE.fullmatch(line)] == []
        return lines

    return printed


@every_network
def test_each_question_that_the_paper_leaves_open_has_a_line_and_no_other(name, assumptions):
    known = experiment(name)
    recipe = recipe_from(known.load(known.recipe), given={"data.root": "cohort"})
    asked = [each for each in known.load(known.decisions) if each.applies(recipe)]
    wanted = [each.question for each in asked if each.by or "paper" in each.differs_from(recipe)]
    lines = assumptions(name)
    assert 10 <= len(wanted) == len(lines) < len(asked)
    assert all(line.startswith(f"{question}: ") for question, line in zip(wanted, lines, strict=True))


@every_network
def test_the_options_that_are_named_are_taken(name, assumptions):
    words = [word for line in assumptions(name) for word in LINE.fullmatch(line)["options"].split(", ")]
    parser = build_parser().parse_args(["train", name, "x", "--out", "x"]).parser
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert {word.split()[0] for word in words if word != "no option"} <= flags
    assert {"--set training.ema_decay", "--init"} <= {*words}


def test_a_line_says_what_is_done_what_the_paper_says_whose_choice_it_is_and_the_option(assumptions):
    lines = assumptions("fias")
    assert "Epochs: 300 (paper: not said; MIST; ACDC 400; --epochs)" in lines
    assert "Three channels come from: conv (paper: not said; trifuse; --set network.input_adapter)" in lines
    assert "Monte Carlo: gate: se (paper: none: times the pooled map; differs; SvANet; --set network.gate)" in lines
    eq_1 = "their own size (paper: the size before (Eq. 1); differs; PKINet; no option)"
    assert f"DMK: depthwise kernels see: {eq_1}" in lines
    strength = "as by default (paper: not said; TransUNet; --set data.augmentation.*)"
    assert f"Strength of the augmentation: {strength}" in lines


def test_other_options_of_the_command_are_counted_in(assumptions):
    assert [line for line in assumptions("fias") if line.startswith("Learning rate")] == []
    changed = assumptions("fias", "--lr", "0.01", "--set", "network.mixatt=false")
    assert "Learning rate: 0.01 (paper: 0.0001; differs; yours; --lr)" in changed
    assert [line for line in changed if line.startswith("Monte Carlo")] == []


def test_a_prior_that_is_to_be_chosen_is_said_and_not_refused(assumptions):
    chosen = "to be chosen (paper: not said; yours to make; --prior, --prior-labels)"
    assert f"Prior: comes from: {chosen}" in assumptions("taff_unet")
    assert not any(line.startswith("Gate: ") for line in assumptions("taff_unet", "--setting", "ap"))


def test_a_run_that_is_there_is_left_alone(assumptions, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.md").write_text("a report")
    assert assumptions("dino_unet", "--overwrite")


def test_wrong_words_are_refused_as_in_a_training(tmp_path, capsys):
    arguments = ["train", "fias", "cohort", "--out", tmp_path / "run", "--show-assumptions"]
    code, out, err = run_main([*arguments, "--set", "network.gat=none"], capsys)
    assert (code, out) == (2, "")
    assert "network.gat" in err
