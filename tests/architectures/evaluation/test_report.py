"""report.md: the headline, the pictures, the tables with their conventions, and nothing about the machine."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from trifuse.architectures.evaluation.charts import draw_training_curves
from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.overlays import Tile, draw_overlays
from trifuse.architectures.evaluation.protocols import Protocol
from trifuse.architectures.evaluation.report import (
    ComparisonSection,
    Evaluation,
    PaperTable,
    check_extras,
    describe_data,
    describe_environment,
    describe_network,
    format_seconds,
    headline_of,
    write_report,
)
from trifuse.architectures.evaluation.scoring import EXTRA, MISSING, OK, Row, score_case
from trifuse.architectures.evaluation.statistics import compare_runs
from trifuse.architectures.evaluation.tables import read_case_table
from trifuse.kernels import MissingExtra, errors

STRICT = Conventions()


def row(case_id, dsc, *, class_name="left atrium", index=None, status=OK, conventions=STRICT, **scores):
    values = {metric: scores.get(metric, dsc) for metric in conventions.metrics}
    return Row(case_id, case_id, class_name, index, status, values, conventions)


def volume_evaluation(*rows):
    return Evaluation("volume", "Per volume", rows or (row("case_1", 0.9), row("case_2", 0.8)))


def sections(text):
    return re.findall(r"^#+ (.*)$", text, re.M)


def test_complete_report(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("epoch,loss,val_dice\n1,0.9,0.5\n2,0.5,0.8\n")
    truth = np.eye(20, dtype=np.uint8)
    tile = Tile("case_1", "", 0, 1, truth * 2.0, truth, truth, (1.0, 1.0), 1.0)
    pictures = [draw_overlays([tile], ("bg", "left atrium"), tmp_path), draw_training_curves(log, tmp_path)]
    sliced = Conventions(aggregation="slice")
    per_slice = Evaluation("slice", "Per slice", [row("case_1", 0.7, index=i, conventions=sliced) for i in range(3)])
    path = write_report(
        tmp_path,
        title="Left atrium",
        evaluations=[volume_evaluation(), per_slice],
        pictures=pictures,
        facts={"Parameters": "3,182,606", "Wall time": "2 min"},
        command=["trifuse", "train", "dino_unet", "--data", "/home/someone/My Data/lascarqs", "--epochs=3"],
        paper_tables=[PaperTable("Table I", ["model", "DSC"], [["giant", "92.3 ± 5.9"]], "Mean and SD in %.")],
        paper="P1",
    )
    text = path.read_text()
    assert path == tmp_path / "report.md"
    assert sections(text) == [
        "Left atrium",
        "Predictions beside the truth",
        "Training curves",
        "Scores",
        "Per volume",
        "Per slice",
        "How it was made",
        "What the paper reports",
        "Table I",
    ]
    assert "**DSC 0.850 ± 0.071** for left atrium, mean ± SD over 2 volumes, empty masks `strict`." in text
    assert "Best case case_1 0.900, worst case_2 0.800." in text
    assert STRICT.describe() in text
    assert sliced.describe() in text
    assert "| left atrium | 2 | 0.850 ± 0.071 |" in text
    assert "| case_1 | 0.900 |" in text
    assert "trifuse train dino_unet --data lascarqs --epochs=3" in text
    assert text.index("not measured here") < text.index("92.3 ± 5.9")
    assert text.index("Per volume") < text.index("What the paper reports")
    for link in re.findall(r"\]\(([^)]*)\)", text):
        assert (tmp_path / link).is_file(), link
        assert not link.startswith("/")
    assert str(tmp_path) not in text
    assert "/home" not in text
    assert read_case_table(tmp_path / "volume_cases.csv")[0].scores["dsc"] == 0.9
    for picture in pictures:
        assert f"![{picture.alt}]" in text


def test_l11_failures_stand_in_the_headline(tmp_path):
    rows = [row("case_1", 0.9), row("case_2", 0.0, status=MISSING), row("stray", 0.0, status=EXTRA)]
    text = write_report(tmp_path, title="t", evaluations=[volume_evaluation(*rows)]).read_text()
    headline = text.split("##")[0]
    assert "2 of 3 predictions failed and score 0" in headline
    assert "case_2 (missing prediction), stray (extra prediction)" in headline
    assert "DSC 0.300" in headline


def test_t19_one_case_has_no_spread(tmp_path):
    text = write_report(tmp_path, title="t", evaluations=[volume_evaluation(row("only", 0.9))]).read_text()
    assert "**DSC 0.900** for left atrium, from 1 volume, empty masks `strict`." in text
    assert "| left atrium | 1 | 0.900 ± - |" in text
    assert "nan" not in text


def test_undefined_scores_are_counted_below_the_table(tmp_path):
    rows = [row("a", 0.9, sensitivity=math.nan), row("b", 0.8)]
    text = write_report(tmp_path, title="t", evaluations=[volume_evaluation(*rows)]).read_text()
    assert "Sensitivity of left atrium: 1 of 2 undefined and left out of the mean." in text
    all_undefined = [row("a", math.nan), row("b", math.nan)]
    assert "**DSC -**" in write_report(tmp_path, title="t", evaluations=[volume_evaluation(*all_undefined)]).read_text()


def test_the_headline_of_a_cohort_with_a_scar_is_the_scar(tmp_path):
    scores = {"a": (0.9, 0.2), "b": (0.8, 0.6)}
    rows = [row(c, d, class_name=k) for c, of in scores.items() for k, d in zip(("wall", "scar"), of, strict=True)]
    report = write_report(tmp_path, title="t", evaluations=[volume_evaluation(*rows)])
    headline = report.read_text().split("\n\n")[1]
    assert headline == (
        "**DSC 0.400 ± 0.283** for scar, mean ± SD over 2 volumes, empty masks `strict`. The mean of classes is "
        "0.625 ± 0.106. Best case b 0.600, worst a 0.200."
    )
    assert headline_of(report) == headline.replace("**", "").replace("`", "")


def test_several_classes(tmp_path):
    rows = [row(c, d, class_name=k) for c in "ab" for k, d in (("cavity", 0.9), ("wall", 0.5))]
    text = write_report(tmp_path, title="t", evaluations=[volume_evaluation(*rows)]).read_text()
    assert "for mean of classes" in text
    assert "| mean of classes | 2 | 0.700 ± 0.000 |" in text
    assert "| a | wall | 0.500 |" in text


def test_names_cannot_break_a_table(tmp_path):
    text = write_report(tmp_path, title="t", evaluations=[volume_evaluation(row("a|b\n<i>[x]", 0.9))]).read_text()
    assert r"| a\|b \<i>\[x\] | 0.900 |" in text


def test_comparison_with_another_run(tmp_path):
    for name, shift in (("a", 0.0), ("b", 0.05)):
        cases = [row(f"case_{i}", 0.8 + 0.01 * i * (1 + shift) + shift) for i in range(5)]
        write_report(tmp_path / name, title=name, evaluations=[volume_evaluation(*cases)])
    rows = compare_runs(tmp_path / "a" / "volume_cases.csv", tmp_path / "b" / "volume_cases.csv")
    section = ComparisonSection("nnU-Net", "ours", rows)
    text = write_report(tmp_path, title="t", evaluations=[volume_evaluation()], comparisons=[section]).read_text()
    assert "A is nnU-Net, B is ours" in text
    assert text.count(STRICT.describe()) == 2
    assert "| left atrium | DSC | 5 |" in text
    assert "\\< 0.001" in text


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("--data /mnt/x/lascarqs/", "--data lascarqs"),
        ("--data=/mnt/x/lascarqs", "--data=lascarqs"),
        ("'~/secret/run 1'", "'run 1'"),
        ("C:\\Users\\me\\data", "data"),
        ("Dice / CE, 1/2, and/or", "Dice / CE, 1/2, and/or"),
        ("relative/folder", "relative/folder"),
    ],
)
def test_l14_absolute_paths_are_cut_down(tmp_path, said, kept):
    path = write_report(tmp_path, title="t", evaluations=[volume_evaluation()], facts={"Fact": said})
    assert f"| Fact | {kept} |" in path.read_text()


def test_data_digest_changes_with_any_byte(make_cohort):
    cohort = make_cohort("a", "b", "c")
    splits = {"train": ["a", "b"], "test": ["c"]}
    facts = describe_data(cohort, splits)
    assert facts["Split"] == "train 2 cases, test 1 case; each taken as a patient of its own"
    of_two = replace(cohort, cases=tuple(replace(case, patient=f"p{case.case_id in 'ab'}") for case in cohort.cases))
    assert describe_data(of_two, splits)["Split"] == "train 2 cases, test 1 case; 2 patients in all"
    assert facts["Classes"] == "0 background, 1 foreground"
    assert re.fullmatch(r"`sha256:[0-9a-f]{64}` of 3 cases", facts["Data digest"])
    assert describe_data(cohort, splits) == facts
    content = cohort.case("b").label.read_bytes()
    cohort.case("b").label.write_bytes(content + b"\0")
    assert describe_data(cohort, splits)["Data digest"] != facts["Data digest"]
    assert str(cohort.root) not in " ".join(facts.values())


def test_network_and_environment():
    network = torch.nn.Sequential(torch.nn.Linear(10, 100), torch.nn.Linear(100, 10))
    network[0].requires_grad_(False)
    assert describe_network(network)["Parameters"] == "2,110, of which 1,010 are trained"
    facts = describe_environment("cpu")
    assert torch.__version__ in facts["Versions"]
    assert facts["Device"].startswith("CPU")


@pytest.mark.parametrize("package", ["scipy", "matplotlib"])
def test_l6_missing_packages_are_named_before_work_starts(monkeypatch, package):
    check_extras()
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(MissingExtra, match=rf"needs {package}.*pip install 'trifuse\[med\]'"):
        check_extras()


def test_durations():
    spoken = [format_seconds(seconds) for seconds in (0.04, 59.9, 200, 3900)]
    assert spoken == ["0.0 s", "59.9 s", "3 min 20 s", "1 h 05 min"]


def test_numbers_of_a_table_are_those_of_its_csv(tmp_path):
    values = np.random.default_rng(0).random(7)
    rows = [row(f"case_{i}", float(value)) for i, value in enumerate(values)]
    write_report(tmp_path, title="t", evaluations=[volume_evaluation(*rows)])
    line = (tmp_path / "volume_summary.csv").read_text().splitlines()[1].split(",")
    assert float(line[2]) == pytest.approx(values.mean())
    assert float(line[3]) == pytest.approx(values.std(ddof=1))


def test_two_conventions_stand_side_by_side_and_beside_every_number(tmp_path):
    transunet = Conventions("transunet")
    strict = [row(c, d, class_name=k, hd95_mm=4.0) for c in "ab" for k, d in (("LV", 0.9), ("RV", 0.5))]
    beside = [row(c, d, class_name=k, hd95_vox=2.0, conventions=transunet)
              for c in "ab" for k, d in (("LV", 0.8), ("RV", 0.3))]  # fmt: skip
    text = write_report(tmp_path, title="t", evaluations=[Evaluation("test", "Test", strict, [beside])]).read_text()
    assert "| Mean ± SD | DSC (strict) | HD95, mm (strict) | DSC (transunet) | HD95, voxels (transunet) |" in text
    assert "| LV | 0.900 ± 0.000 | 4.00 ± 0.00 | 0.800 ± 0.000 | 2.00 ± 0.00 |" in text
    assert "| mean of classes | 0.700 ± 0.000 | 4.00 ± 0.00 | 0.550 ± 0.000 | 2.00 ± 0.00 |" in text
    assert STRICT.describe() in text
    assert transunet.describe() in text
    assert "| a | 0.800 / 2.00 | 0.300 / 2.00 |" in text
    assert "empty masks `strict`" in text.split("##")[0]
    assert read_case_table(tmp_path / "test_cases.csv")[0].conventions == STRICT
    assert read_case_table(tmp_path / "test_transunet_cases.csv")[0].scores["hd95_vox"] == 2.0
    summary = (tmp_path / "test_summary.csv").read_text()
    assert summary.count(STRICT.label) == 18
    assert summary.count(transunet.label) == 18
    for link in re.findall(r"\]\(([^)]*)\)", text):
        assert (tmp_path / link).is_file(), link


def test_the_publication_s_protocol_stands_beside_the_strict_one_with_what_differs(tmp_path):
    """Two cases without the organ, in one of which it is seen: what TransUNet's rules make of them is said."""
    rows = {name: [] for name in ("strict", "transunet")}
    organ, nothing = np.ones((2, 4, 4), np.uint8), np.zeros((2, 4, 4), np.uint8)
    for name, of in rows.items():
        for case, (found, true) in {"a": (organ, organ), "b": (nothing, nothing), "c": (organ, nothing)}.items():
            of += score_case(found, true, (5, 1, 1), ("bg", "liver"), Conventions(name), case_id=case, patient=case)
    protocol = Protocol(Conventions("transunet"), ("dsc",), "The paper does not spell out how it scores.")
    evaluation = Evaluation("test", "Test", rows["strict"], [rows["transunet"]], protocol)
    text = write_report(tmp_path, title="t", evaluations=[evaluation]).read_text()
    _, _, shown = text.partition("#### Two protocols\n\nThe paper does not spell out how it scores.\n\n")
    table, rules, changed, conventions, cases, *_ = shown.split("\n\n")
    assert table.splitlines()[0] == "| Mean ± SD | DSC (strict) | DSC (transunet) |"
    assert table.splitlines()[2] == "| liver | 0.667 ± 0.577 | 0.667 ± 0.577 |"
    assert rules.splitlines() == [
        "* Where both masks are empty, `strict` scores DSC 1, and `transunet` scores DSC 0.",
        "* Where only the truth is empty, `strict` scores DSC 0, and `transunet` scores DSC 1.",
    ]
    assert changed == "Of 3 rows of scores that changes DSC in 2."
    assert conventions == Conventions("transunet").describe()
    assert "| c | 1.000 / 0.00 |" in cases
    assert text.index("| liver | 3 | 0.667 ± 0.577 |") < text.index("#### Two protocols")


def test_read_outs_lie_beside_the_scores_of_whole_volumes_alone(tmp_path):
    scar = np.full((2, 4, 4), 2, np.uint8)
    names = ("bg", "myocardium", "scar")
    for name, conventions in {"all": STRICT, "some": Conventions(slices="labelled")}.items():
        rows = score_case(scar, scar, (5, 1, 1), names, conventions, case_id="a", patient="a")
        text = write_report(tmp_path, title="t", evaluations=[Evaluation(name, "Test", rows)]).read_text()
        assert ("(volumes in mL, masses in g, at 1.05 g/mL, burden in %)" in text) == (name == "all")
    assert [path.name for path in tmp_path.glob("*readouts*")] == ["all_readouts.csv"]


def test_of_many_classes_the_cases_have_a_line_each(tmp_path):
    rows = [row(c, d, class_name=k) for c in "ab" for k, d in zip("wxyz", (0.1, 0.2, 0.3, 0.4), strict=True)]
    text = write_report(tmp_path, title="t", evaluations=[volume_evaluation(*rows)]).read_text()
    assert "| a | 0.100 / 0.10 | 0.200 / 0.20 | 0.300 / 0.30 | 0.400 / 0.40 |" in text
    assert "| a | w |" not in text


def test_a_cohort_without_spacings_says_so(make_cohort):
    cohort = make_cohort("a")
    assert "Spacing" not in describe_data(cohort, {"test": ["a"]})
    assert "in voxels" in describe_data(replace(cohort, has_spacing=False), {"test": ["a"]})["Spacing"]
