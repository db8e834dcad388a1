"""The report over several runs: the mean of each run, then mean and SD over the runs."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest

from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.protocols import Protocol
from trifuse.architectures.evaluation.report import PaperTable
from trifuse.architectures.evaluation.scoring import OK, Row
from trifuse.architectures.evaluation.tables import case_tables, write_case_table
from trifuse.architectures.runs.repeats_report import RepeatedRun, write_repeats_report
from trifuse.kernels import DataError

STRICT, TRANSUNET = Conventions(), Conventions("transunet")
DSC = {1: {"LV": (0.8, 0.6), "RV": (0.4, 0.4)}, 2: {"LV": (0.9, 0.9), "RV": (0.5, 0.7)}}  # by run and class, two cases


def finished(out, number, *, conventions=(STRICT, TRANSUNET)):
    folder = out / f"run_{number}"
    folder.mkdir(parents=True)
    for chosen in conventions:
        rows = [
            Row(f"case_{i}", f"case_{i}", name, None, OK, dict.fromkeys(chosen.metrics, dsc), chosen)
            for name, scores in DSC[number].items()
            for i, dsc in enumerate(scores)
        ]
        word = "" if chosen == STRICT else "_transunet"
        write_case_table(folder / f"test{word}_cases.csv", rows)
    (folder / "log.csv").write_text(f"epoch,loss,val_dice\n1,{number},0.5\n2,{number / 2},0.{number}\n")
    (folder / "report.md").write_text("")
    return RepeatedRun(folder, 2222 + number)


def test_mean_and_sd_over_runs_under_both_conventions(tmp_path):
    runs = [finished(tmp_path, k) for k in (1, 2)]
    table = PaperTable("Table", ("a",), (("1",),))
    path = write_repeats_report(tmp_path, runs, title="t", facts={"Device": "CPU"}, paper_tables=[table], paper="P2")
    text = path.read_text()
    sd = np.std([0.7, 0.9], ddof=1)
    assert f"| LV | 0.800 ± {sd:.3f} | 0.80 ± {sd:.2f} | 0.800 ± {sd:.3f} | 0.80 ± {sd:.2f} |" in text
    overall = np.std([0.55, 0.75], ddof=1)
    assert f"**DSC 0.650 ± {overall:.3f}** for mean of classes, mean ± SD over 2 runs of 2 cases each" in text
    assert "| run_1 | 2223 | 0.550 | 0.55 | 0.550 | 0.55 |" in text
    assert "| run_2 | 2224 | 0.750 | 0.75 | 0.750 | 0.75 |" in text
    assert STRICT.describe() in text
    assert TRANSUNET.describe() in text
    assert text.index("not measured here") > text.index("run_2")
    for link in re.findall(r"\]\(([^)]*)\)", text):
        assert (tmp_path / link).is_file(), link


def test_the_publication_s_protocol_says_which_scores_and_which_rules(tmp_path):
    protocol = Protocol(TRANSUNET, ("dsc", "iou"), "The paper does not say how it scores.")
    text = write_repeats_report(tmp_path, [finished(tmp_path, 1)], title="t", protocol=protocol).read_text()
    assert "| Mean ± SD | DSC (strict) | IoU (strict) | DSC (transunet) | IoU (transunet) |" in text
    rule = "* Where both masks are empty, `strict` scores DSC 1 and IoU 1, and `transunet` scores DSC 0 and IoU 0."
    assert f"{protocol.source}\n\n{rule}\n" in text


def test_runs_of_older_versions_show_what_all_of_them_have(tmp_path):
    runs = [finished(tmp_path, 1, conventions=(STRICT,)), finished(tmp_path, 2)]
    text = write_repeats_report(tmp_path, runs, title="t").read_text()
    assert STRICT.describe() in text
    assert TRANSUNET.describe() not in text


def test_t19_one_run_has_no_spread(tmp_path):
    text = write_repeats_report(tmp_path, [finished(tmp_path, 1)], title="t").read_text()
    assert "**DSC 0.550 ± -** for mean of classes, mean ± SD over 1 run of 2 cases each" in text
    assert "nan" not in text.lower()


@pytest.mark.parametrize(("validate", "said"), [(["c"], False), ([], True)])
def test_curves_of_runs_without_validation_cases_are_of_the_training_cases(tmp_path, validate, said):
    runs = [finished(tmp_path, k) for k in (1, 2)]
    for run in runs:
        (run.folder / "split.json").write_text(json.dumps({"train": ["a"], "val": validate, "test": ["b"]}))
    text = write_repeats_report(tmp_path, runs, title="t").read_text()
    assert ("No case validates: the scores are those of the training cases." in text) == said


def test_runs_with_a_scar_are_told_by_it(tmp_path, monkeypatch):
    scarred = {number: {"LV": of["LV"], "scar": of["RV"]} for number, of in DSC.items()}
    monkeypatch.setattr(f"{__name__}.DSC", scarred)
    text = write_repeats_report(tmp_path, [finished(tmp_path, k) for k in (1, 2)], title="t").read_text()
    means = [np.mean(scarred[k]["scar"]) for k in (1, 2)]
    overall = np.std([0.55, 0.75], ddof=1)
    assert f"**DSC {np.mean(means):.3f} ± {np.std(means, ddof=1):.3f}** for scar, mean ± SD over 2 runs" in text
    assert f"The mean of classes is 0.650 ± {overall:.3f}." in text
    assert "DSC of scar (strict)" in text
    assert f"| run_1 | 2223 | {means[0]:.3f} |" in text


def test_the_tables_of_all_runs(tmp_path):
    write_repeats_report(tmp_path, [finished(tmp_path, k) for k in (1, 2)], title="t")
    lines = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert len(lines) == 2 * 2 * 3 * 6  # conventions, runs, classes and their mean, scores
    found = {(line["run"], line["class_name"]): float(line["mean"]) for line in lines if line["metric"] == "dsc"}
    assert found["run_1", "LV"] == pytest.approx(0.7)
    assert found["run_2", "mean of classes"] == pytest.approx(0.75)
    (summary,) = (
        line
        for line in csv.DictReader((tmp_path / "summary.csv").open())
        if (line["class_name"], line["metric"], line["conventions"]) == ("RV", "dsc", STRICT.label)
    )
    assert (float(summary["mean"]), summary["count"]) == (pytest.approx(0.5), "2")
    log = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [float(line["loss_run_2"]) for line in log] == [2, 1]
    assert [float(line["val_dice_run_1"]) for line in log] == [0.5, 0.1]


def test_a_run_without_a_table_is_named(tmp_path):
    runs = [finished(tmp_path, k) for k in (1, 2)]
    for table in case_tables(runs[1].folder):
        table.unlink()
    with pytest.raises(DataError, match=r"run_2: case table: expected test_cases\.csv"):
        write_repeats_report(tmp_path, runs, title="t")


def test_the_headlines_tables_come_first(tmp_path):
    run = finished(tmp_path, 1)
    assert [path.name for path in case_tables(run.folder)] == ["test_cases.csv", "test_transunet_cases.csv"]
    alone = finished(tmp_path / "alone", 1, conventions=(STRICT,))
    assert [path.name for path in case_tables(alone.folder)] == ["test_cases.csv"]
