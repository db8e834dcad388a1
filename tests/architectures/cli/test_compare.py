"""``trifuse compare``: several networks in one picture, and two in a test."""

from __future__ import annotations

import csv
import re
import shutil

from command import SCAR_TRAINING, run_main

from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.evaluation.interval_figures import interval_days
from trifuse.architectures.evaluation.tables import read_case_table
from trifuse.architectures.storage.record import read_record, write_record


def test_several_networks_in_one_picture(plain_run, scar_cohort, tmp_path, capsys):
    other = tmp_path / "baseline"
    words = ["train", "taff_unet", scar_cohort, "--setting", "baseline", "--out", other, *SCAR_TRAINING]
    assert run_main(words, capsys)[0] == 0
    code, output, _ = run_main(["compare", "--overlay", plain_run, other, "--out", tmp_path / "sheet"], capsys)
    assert code == 0
    own = (tmp_path / "sheet" / "model_overlays.png").read_bytes()
    (tmp_path / "sheet" / "model_overlays.png").write_bytes(b"somebody's own")
    again = ["compare", "--overlay", plain_run, other, "--out", tmp_path / "sheet"]
    code, _, errors = run_main(again, capsys)
    assert (code, "model_overlays.csv is not the table of an earlier picture" in errors) == (2, True)
    (tmp_path / "sheet" / "model_overlays.png").write_bytes(own)
    assert run_main(again, capsys)[0] == 0
    assert "model_overlays.png" in output
    assert run_main(["compare", plain_run, other], capsys)[0] == 0  # the paired test
    for wrong, message in (
        (["compare", plain_run], "expected two runs to compare"),
        (["compare", plain_run, other, plain_run], "expected two runs to compare"),
        (["compare", "--overlay", plain_run, other], "say with --out which folder"),
    ):
        code, _, errors = run_main(wrong, capsys)
        assert code == 2
        assert message in errors


def test_t14_runs_on_other_cases_of_the_same_names_are_not_compared(plain_run, tmp_path, capsys):
    other = shutil.copytree(plain_run, tmp_path / "other")
    assert run_main(["compare", plain_run, other], capsys)[0] == 0
    results = read_record(other / "results.json")
    case = next(iter(read_case_table(other / "test_cases.csv"))).case_id
    write_record(other / "results.json", {**results, "digests": {**results["digests"], case: "0" * 16}})
    code, _, errors = run_main(["compare", plain_run, other], capsys)
    assert code == 3
    assert f"other images, labels or ECGs under the names {case}" in errors
    for drawn in (["--overlay"], ["--by", "interval"]):
        words = ["compare", *drawn, plain_run, other, "--out", tmp_path / "drawn"]
        code, _, errors = run_main(words, capsys)
        assert (code, f"other images, labels or ECGs under the names {case}" in errors) == (3, True), drawn
    same = shutil.copytree(plain_run, tmp_path / "same")
    code, _, errors = run_main(["compare", "--overlay", plain_run, same, other, "--out", tmp_path / "drawn"], capsys)
    assert (code, f"{other}" in errors, f"{same}" in errors) == (3, True, False)
    assert run_main(["compare", *(run / "test_cases.csv" for run in (plain_run, other))], capsys)[0] == 0


def test_two_runs_by_the_days_between_ecg_and_mri(plain_run, scar_cohort, tmp_path, capsys):
    """The second run is the first with other scores; a case that it did not score is left out."""
    other, out = shutil.copytree(plain_run, tmp_path / "other"), tmp_path / "fig3"
    lines = (plain_run / "test_cases.csv").read_text().splitlines()
    place = lines[0].split(",").index("dsc")
    changed = [lines[0]]
    for line in lines[1:]:
        cells = line.split(",")
        cells[place] = str(0.25 if cells[2] == "scar" else 1.0)
        changed.append(",".join(cells))
    (other / "test_cases.csv").write_text("\n".join([*changed, ""]))
    words = ["compare", "--by", "interval", plain_run, other]
    for command in (["compare", plain_run, other], [*words, "--out", out]):  # c22: it is not what the run wrote
        code, _, errors = run_main(command, capsys)
        assert code == 4
        assert "other/test_cases.csv: the content has changed since the run wrote it" in errors
    (other / "results.json").unlink()
    code, output, _ = run_main([*words, "--out", out], capsys)
    assert code == 0
    assert (out / "interval_bars.png").stat().st_size > 10_000
    cohort = open_cohort(scar_cohort)
    scored = {
        row.case_id: row.scores["dsc"]
        for row in read_case_table(plain_run / "test_cases.csv")
        if row.class_name == "scar"
    }
    days = interval_days(cohort, scored)
    assert days
    mean = sum(scored[case] for case in days) / len(days)
    last = next(line.split() for line in output.splitlines() if line.startswith("all"))
    assert last == ["all", str(len(days)), f"{mean:.3f}", "0.250", f"{0.25 - mean:+.3f}"]
    assert "A: plain" in output
    assert "B: other" in output
    drawn = list(csv.DictReader((out / "interval_bars.csv").open()))
    assert {line["model"] for line in drawn} == {"plain", "other"}
    assert sum(int(line["cases"]) for line in drawn) == 2 * len(days)
    assert {float(line["mean"]) for line in drawn if line["model"] == "other" and line["cases"] != "0"} == {0.25}

    kept = [line for line in changed if not line.startswith(next(iter(days)))]
    (other / "test_cases.csv").write_text("\n".join([*kept, ""]))
    code, output, errors = run_main([*words, "--out", out], capsys)
    assert re.search(rf"all +{len(days) - 1} ", output) if len(days) > 1 else "none with an ECG" in errors


def test_a_picture_by_days_needs_a_folder_and_two_runs(plain_run, tmp_path, capsys):
    for wrong, message in (
        (["--by", "interval", plain_run, plain_run], "--by interval draws a picture: say with --out which folder"),
        (["--by", "interval", plain_run, plain_run, plain_run, "--out", tmp_path], "expected two runs to compare"),
        (
            ["--by", "interval", plain_run / "test_cases.csv", plain_run, "--out", tmp_path],
            f"--by interval looks at the cases of a run: expected folders of runs, got {plain_run / 'test_cases.csv'}",
        ),
        (["--by", "intervals", plain_run, plain_run], "did you mean interval?"),
        (["--by", "interval", "--overlay", plain_run, plain_run], "not allowed with argument"),
    ):
        code, _, errors = run_main(["compare", *wrong], capsys)
        assert code == 2
        assert message in errors
