"""The ledger of the papers: no statement is dropped, and the code, the tests and the options that it names exist."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from trifuse.architectures.runs.decisions import field_value, shown
from trifuse.architectures.runs.registry import experiments
from trifuse.architectures.runs.shared_decisions import SILENT
from trifuse.benchmarks.reporting.fidelity import (
    OPEN,
    OUTLINE,
    PAPER,
    PLACES,
    SHARED,
    Row,
    Setting,
    fidelity_tables,
    rows,
)

ROOT = Path(__file__).resolve().parents[3]
ROWS = rows()
RECIPES = {what.name: one.load(what.recipe) for one in experiments() for what in (one, *one.pretrainings)}
WITH_A_PAPER = [one for one in experiments() if one.name in OUTLINE]


# --------------------------------------------------------------------------------------------------- nothing dropped


def test_every_section_has_all_of_its_rows_in_their_order():
    wanted = [
        f"{paper}-{section}-{number}"
        for paper, sections in OUTLINE.items()
        for section, (_, count) in sections.items()
        for number in range(1, count + 1)
    ]
    assert [row.id for row in ROWS] == wanted


@pytest.mark.parametrize("paper", PLACES)
def test_everything_that_a_paper_numbers_has_a_row(paper):
    covered = {place for row in ROWS if row.paper == paper for place in places_of(row.place)}
    assert {*PLACES[paper]} - covered == set()


def places_of(place: str) -> set[str]:
    """Return the places of a row; "Eqs. 9-10" are two."""
    if not place.startswith("Eqs. "):
        return {place}
    first, _, last = place.removeprefix("Eqs. ").partition("-")
    return {f"Eq. {number}" for number in range(int(first), int(last) + 1)}


def test_every_open_question_is_answered_and_no_other():
    assert {question for row in ROWS for question in row.decides} == {*OPEN}


def test_places_are_read_one_by_one():
    assert places_of("Eqs. 9-11") == {"Eq. 9", "Eq. 10", "Eq. 11"}
    assert places_of("Fig. 2a-c") == {"Fig. 2a-c"}


@pytest.mark.parametrize("known", WITH_A_PAPER, ids=lambda known: known.name)
def test_every_field_that_a_paper_speaks_of_or_leaves_to_a_network_has_a_row(known):
    """But those that no paper speaks of, such as a moving average, and the strengths of an augmentation, which are
    parameters here."""
    recipe = known.load(known.recipe)()
    ledger = {setting.name for row in ROWS for setting in row.settings if setting.owner == known.name}
    asked = [each for each in known.load(known.decisions) if each.is_said or each.applies(recipe)]
    wanted = {name for each in asked if each not in SILENT for name in each.fields}
    assert {name for name in wanted - ledger if not name.startswith("data.augmentation.")} == set()


def test_the_papers_are_those_of_the_networks():
    own = {one.name for one in experiments() if one.paper} - {"plain_unet"}  # whose publication is nnU-Net's
    assert own == {*OUTLINE} - {SHARED} == {*PLACES}


# ------------------------------------------------------------------------------------------- what a row names exists


def test_a_row_says_what_is_done_and_by_whom():
    assert [row.id for row in ROWS if not (row.place and row.by and row.does and row.code and row.test)] == []
    silent = [row.id for row in ROWS if row.by == PAPER and not row.says]
    assert silent == [], "what a paper does not say is decided by somebody else"


def test_the_code_of_every_row_can_be_imported():
    assert [(row.id, name) for row in ROWS for name in row.code if not exists(name)] == []


def exists(dotted: str) -> bool:
    """Tell whether a dotted name stands for something that can be imported."""
    try:
        named(dotted)
    except AttributeError:
        return False
    return True


def named(dotted: str) -> Any:
    """Return what a dotted name stands for."""
    parts = dotted.split(".")
    length = next(n for n in range(len(parts) - 1, 0, -1) if is_module(".".join(parts[:n])))
    found = import_module(".".join(parts[:length]))
    for part in parts[length:]:
        found = getattr(found, part)
    return found


@cache
def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the name before the last dot is no package
        return False


def test_the_tests_of_every_row_exist():
    assert [(row.id, test) for row in ROWS for test in row.test if not is_test(test)] == []


def is_test(node: str) -> bool:
    """Tell whether a file has the function that a test's id names."""
    file, _, function = node.partition("::")
    return function.startswith("test_") and function in functions_of(file)


@cache
def functions_of(file: str) -> frozenset[str]:
    path = ROOT / file
    tree = ast.parse(path.read_text(encoding="utf-8") if path.is_file() else "")
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_option_is_there_and_has_the_default_that_is_stated():
    stated = [(row.id, setting) for row in ROWS for setting in row.settings]
    assert len(stated) > 200
    assert [
        (id_, setting, default_of(setting)) for id_, setting in stated if default_of(setting) != setting.default
    ] == []


def default_of(setting: Setting) -> str:
    """Return the default of a recipe's field, or of a parameter, as the table writes it."""
    if setting.is_field:
        return shown(field_value(RECIPES[setting.owner](), setting.name))
    return shown(inspect.signature(named(setting.owner)).parameters[setting.name].default)


def test_names_that_there_are_not_are_told_apart_from_those_that_there_are():
    assert exists("trifuse.blocks.block_selection.heaviest_blocks")
    assert exists("trifuse.blocks.weighted_block_fusion.WeightedBlockFusion.selected")
    assert not exists("trifuse.blocks.block_selection.lightest_blocks")
    assert not is_test("tests/blocks/test_block_selection.py::test_nothing")
    assert not is_test("tests/blocks/test_nothing.py::test_nothing")


# ------------------------------------------------------------------------------------------------------------ the page


def test_every_row_has_its_line_and_links_to_its_code_and_its_tests():
    lines = [line for paper in OUTLINE for line in fidelity_tables(paper).splitlines() if line.startswith("| ")]
    lines = [line for line in lines if not line.startswith(("| Row", "| ---"))]
    assert len(lines) == len(ROWS)
    assert {line.count(" | ") for line in lines} == {6}
    first = next(line for line in lines if "heaviest_blocks" in line)
    assert "[`heaviest_blocks`](../blocks/block_selection.py)" in first
    assert "(../tests/blocks/test_weighted_block_fusion.py)" in first
    assert "`network.top_k=4`" in first


def test_an_option_is_shown_as_it_is_given():
    table = fidelity_tables("dino_unet")
    assert "`training.lr=5e-05`, `training.weight_decay=0.0001` |" in table
    assert "`Conventions(aggregation=volume)`" in table
    assert "`network.order=depth` |" in table


def test_an_answer_that_is_not_the_papers_is_marked():
    table = fidelity_tables("dino_unet").splitlines()
    assert any("| not said | The deepest of the chosen blocks" in line and "(trifuse) |" in line for line in table)
    assert any("| Betas 0.90 and 0.95. | The same. |" in line for line in table)


def test_open_questions_name_the_rows_that_answer_them():
    table = fidelity_tables("open")
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]] == [*OPEN]
    assert "dino_unet 3.5-1: " in table
    assert "<br>dino_unet 3.5-2: " in table


def test_what_is_no_option_is_refused():
    row = Row("fias-1-1", "text", "", "trifuse", "", (), (), (), "network.norm: batch")
    with pytest.raises(ValueError, match=r"fias-1-1: expected field=value or dotted.name\(parameter=value\)"):
        list(row.settings)


def test_pages_show_every_paper():
    page = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    assert [paper for paper in ("open", *OUTLINE) if f"<!-- fidelity: {paper} -->" not in page] == []
