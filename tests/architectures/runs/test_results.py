"""What is noted of a run's results: what they were made of, and which files are its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from finished_run import mark_finished

from trifuse.architectures.dino_unet.train import DinoUNetRecipe
from trifuse.architectures.runs.prepared_data import open_split
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.architectures.runs.results import (
    check_same_cases,
    check_tables,
    has_finished,
    is_kept,
    named_files,
    noted_results,
)
from trifuse.architectures.storage.atomic_files import write_text
from trifuse.architectures.storage.config_json import config_to_json
from trifuse.architectures.storage.record import read_record, write_record
from trifuse.kernels import CheckpointError, DataError


@pytest.fixture
def recipe(put_case, tmp_path):
    for name in ("a", "b", "c"):
        put_case(name, seed=ord(name), root=tmp_path / "cohort")
    split = tmp_path / "split.json"
    split.write_text('{"train": ["a", "b"], "val": [], "test": ["c"]}')
    return DinoUNetRecipe(DataRecipe(root=str(tmp_path / "cohort"), split=str(split)))


@pytest.fixture
def run(tmp_path, recipe):
    folder = tmp_path / "run"
    folder.mkdir()
    assert not has_finished(folder, recipe)
    mark_finished(folder, recipe)
    assert has_finished(folder, recipe)
    return folder


def test_l16_a_run_has_finished_by_its_report_its_recipe_and_its_split(run, recipe, tmp_path, capsys):
    assert is_kept(run, replace(recipe, training=replace(recipe.training, workers=3)))
    assert "run has finished, with this recipe and of these data, and is kept" in capsys.readouterr().err
    for name, value in (("epochs", 99), ("lr", 0.5)):
        assert not is_kept(run, replace(recipe, training=replace(recipe.training, **{name: value})))
    assert capsys.readouterr().err == ""
    assert not has_finished(run, recipe, ("test", "val"))
    split = tmp_path / "split.json"
    written = split.read_text()
    split.write_text('{"train": ["a"], "val": ["b"], "test": ["c"]}')
    assert not has_finished(run, recipe)
    split.write_text(written.replace(",", ",\n"))
    assert has_finished(run, recipe)
    for name in ("report.md", "results.json", "split.json"):
        mark_finished(run, recipe)
        (run / name).unlink()
        assert not has_finished(run, recipe), name


def test_t14_a_run_does_not_go_on_under_another_split(run, recipe, tmp_path):
    """By which cases that were trained on might test; a file that has gone says nothing, and the run has its own."""
    split = tmp_path / "split.json"
    split.write_text('{"train": ["a", "c"], "val": [], "test": ["b"]}')
    with pytest.raises(DataError, match=r"split\.json: split: .*got 'b', 'c' in other parts than when the run began"):
        open_split(recipe.data, run)
    split.write_text('{"train": ["a"], "val": [], "test": ["c"], "unused": ["b"]}')
    with pytest.raises(DataError, match=r"got 'b' in other parts than when the run began"):
        open_split(recipe.data, run)
    split.unlink()
    assert open_split(recipe.data, run)[1].test == ("c",)
    by_patterns = replace(recipe.data, split=None, test_cases=("c",))
    assert open_split(by_patterns, run)[1].test == ("c",)
    with pytest.raises(DataError, match="'b', 'c' in other parts"):
        open_split(replace(by_patterns, test_cases=("b",)), run)
    assert not has_finished(run, replace(recipe, data=replace(by_patterns, test_cases=("b",))))


@pytest.mark.parametrize("file", ["images/a.nii.gz", "labels/c.nii.gz"])
def test_l16_a_run_on_other_data_has_not_finished(run, recipe, tmp_path, put_case, file):
    """Those of a test case count, too: its scores stand in the report."""
    put_case(file[7], seed=9, root=tmp_path / "cohort")
    assert not has_finished(run, recipe)
    (tmp_path / "cohort" / file).unlink()
    assert not has_finished(run, recipe)


def test_l16_a_run_whose_validation_case_has_changed_has_not_finished(run, recipe, tmp_path, put_case):
    (tmp_path / "split.json").write_text('{"train": ["a"], "val": ["b"], "test": ["c"]}')
    mark_finished(run, recipe)
    assert has_finished(run, recipe)
    put_case("b", seed=9, root=tmp_path / "cohort")
    assert not has_finished(run, recipe)


def test_c22_a_table_that_has_changed_is_named_and_no_reason_to_keep_its_run(run, recipe):
    with noted_results(run, **read_record(run / "results.json")):
        write_text(run / "test_cases.csv", "case_id,dsc\nc,0.25\n")
    assert has_finished(run, recipe)
    check_tables(run)
    (run / "test_cases.csv").write_text("case_id,dsc\nc,0.75\n")
    with pytest.raises(CheckpointError, match=r"test_cases\.csv: the content has changed since the run wrote it"):
        check_tables(run)
    assert not has_finished(run, recipe)
    (run / "results.json").unlink()  # as in runs of older versions
    check_tables(run)


def test_c22_what_is_added_to_a_run_forgets_none_of_its_tables(run, recipe):
    """Its log, which training wrote before, is one of them."""
    (run / "log.csv").write_text("epoch,loss\n1,0.5\n")
    with noted_results(run, **read_record(run / "results.json")):
        write_text(run / "test_cases.csv", "case_id,dsc\nc,0.25\n")
    with noted_results(run):
        write_text(run / "val_cases.csv", "case_id,dsc\nb,0.5\n")
    assert has_finished(run, recipe)
    for name in ("test_cases.csv", "val_cases.csv", "log.csv"):
        written = (run / name).read_text()
        (run / name).write_text(written.replace("5\n", "6\n"))
        with pytest.raises(CheckpointError, match=rf"{name}: the content has changed"):
            check_tables(run)
        (run / name).write_text(written)


@pytest.mark.parametrize("option", [{"channel": "1"}, {"frame": 1}])
def test_t14_cases_are_of_other_files_by_intent_on_another_channel_or_frame(tmp_path, recipe, option):
    for name, data in (("first", recipe.data), ("same", recipe.data), ("other", replace(recipe.data, **option))):
        (tmp_path / name).mkdir()
        write_record(tmp_path / name / "run.json", {"config": {"data": config_to_json(data)}})
        write_record(tmp_path / name / "results.json", {"digests": {"a": name}})
    check_same_cases(tmp_path / "other", tmp_path / "first")
    with pytest.raises(DataError, match="other images, labels or ECGs under the names a"):
        check_same_cases(tmp_path / "same", tmp_path / "first")


def test_t14_targets_of_one_name_that_are_other_labels_are_not_compared(tmp_path, recipe):
    for name, targets in (("first", ("a=1", "b=2")), ("second", ("a=2", "c=2"))):
        (tmp_path / name).mkdir()
        described = {"config": {"data": config_to_json(replace(recipe.data, targets=targets))}}
        write_record(tmp_path / name / "run.json", described)
    with pytest.raises(DataError, match=r"targets: expected those of .*first: a=1, got a=2"):
        check_same_cases(tmp_path / "second", tmp_path / "first")


def test_l15_what_a_run_has_drawn_is_its_own_and_nothing_else(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.png").write_text("mine")
    assert named_files(tmp_path) == frozenset()
    (tmp_path / "report.md").touch()
    assert named_files(tmp_path) is None  # an older version's
    with noted_results(tmp_path):
        write_text(tmp_path / "figures" / "curves.png", "drawn")
        write_text(tmp_path / "elsewhere.png", "drawn")
    assert named_files(tmp_path) == {"figures/curves.png"}
    (tmp_path / "audit").mkdir()
    with noted_results(tmp_path):
        write_text(tmp_path / "audit" / "audit.md", "page")
    assert named_files(tmp_path) == {"figures/curves.png", "audit/audit.md"}
    write_record(tmp_path / "results.json", {"files": ["figures/curves.png"]})
    text = (tmp_path / "results.json").read_text()
    (tmp_path / "results.json").write_text(text.replace("curves", "mine"))
    assert named_files(tmp_path) == frozenset()
