"""Paired tests against their definitions, and two runs compared."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.report import ComparisonSection, Evaluation, write_report
from trifuse.architectures.evaluation.scoring import Row
from trifuse.architectures.evaluation.statistics import (
    bootstrap_interval,
    bootstrap_intervals,
    compare_runs,
    format_comparison,
    format_p,
    holm,
    mean_interval,
    paired_t_test,
    wilcoxon_test,
    write_comparison_table,
)
from trifuse.architectures.evaluation.tables import read_case_table, write_case_table
from trifuse.kernels import DataError

STRICT = Conventions()


def table(path, scores, *, patients=None, conventions=STRICT, class_name="atrium"):
    rows = [
        Row(
            case,
            (patients or {}).get(case, case),
            class_name,
            None,
            "ok",
            dict.fromkeys(STRICT.metrics, s),
            conventions,
        )
        for case, s in scores.items()
    ]
    write_case_table(path, rows)
    return path


def test_t_test_by_hand():
    a, b = [1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 5.0, 5.0]
    d = np.array([1.0, 0.0, 2.0, 1.0])
    t = d.mean() / (math.sqrt(((d - d.mean()) ** 2).sum() / 3) / 2)
    result = paired_t_test(a, b)
    assert result.statistic == pytest.approx(t)
    assert (result.p, result.count) == (pytest.approx(2 * stats.t.sf(t, 3)), 4)


def test_interval_of_a_mean_by_hand():
    """Of 1, 2, 3: mean 2, SD 1, and t of 2 degrees of freedom is 4.3027 at 95 %."""
    reach = 4.302653 / math.sqrt(3)
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - reach, 2 + reach))
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5)
    assert all(map(math.isnan, mean_interval([1.0])))


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=20))
@settings(deadline=None, max_examples=60)
def test_t_test_equals_scipy(pairs):
    a, b = np.array(pairs).T
    if np.std(b - a) < 1e-9:
        return
    theirs = stats.ttest_rel(b, a)
    ours = paired_t_test(a, b)
    assert ours.statistic == pytest.approx(theirs.statistic, rel=1e-9)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-7, abs=1e-12)


def test_t_test_without_spread():
    assert paired_t_test([0.1, 0.5, 0.7], [0.1, 0.5, 0.7]).p == 1
    better = paired_t_test([0.7, 0.8, 0.1], [0.8, 0.9, 0.2])  # 0.1 each time, up to rounding
    assert (better.p, better.statistic) == (0, math.inf)
    assert paired_t_test([0.8, 0.9], [0.7, 0.8]).statistic == -math.inf


def test_too_few_pairs_have_no_p_value():
    assert math.isnan(paired_t_test([0.1], [0.2]).p)
    assert math.isnan(paired_t_test([], []).p)
    assert math.isnan(wilcoxon_test([], []).p)


def test_wilcoxon():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 15))
    assert wilcoxon_test(a, b).p == pytest.approx(stats.wilcoxon(b - a).pvalue)
    assert wilcoxon_test(a, a).p == 1
    assert wilcoxon_test([1, 2, 3, 4, 5], [2, 3, 4, 5, 6]).p == pytest.approx(2 / 2**5)


@pytest.mark.parametrize("scale", [1, 93710.3])
def test_equal_differences_have_one_rank_whatever_the_rounding_of_the_scores(scale):
    a = scale * np.array([0.63, 0.13, 0.55, 0.88, 0.84])
    d = np.array([-2, 2, -2, -2, 0])
    b = a + scale / 100 * d
    assert len(set(np.abs(b - a)[:4])) > 1, "they differ by rounding"
    assert wilcoxon_test(a, b).p == pytest.approx(stats.wilcoxon(d).pvalue)


def test_scores_share_draws_and_no_table_of_all_draws_is_made(monkeypatch):
    """Each interval is what a table of all draws gives; the draws of 4000 patients are made once for six scores."""
    rng = np.random.default_rng(1)
    made, largest = [], 0
    bincount = np.bincount

    def watched(x, *args, **kwargs):
        nonlocal largest
        largest = max(largest, len(x))
        return bincount(x, *args, **kwargs)

    def generator(seed):
        made.append(seed)
        return np.random.Generator(np.random.PCG64(seed))

    patients = np.array([f"p{i}" for i in range(4000)])
    scores = [(rng.normal(size=4000), patients, np.ones(4000)) for _ in range(6)]
    scores.append((rng.normal(size=30), np.repeat(patients[:10], 3), np.ones(30)))
    with monkeypatch.context() as patch:
        patch.setattr("numpy.bincount", watched)
        patch.setattr("numpy.random.default_rng", generator)
        intervals = bootstrap_intervals(scores, resamples=500, seed=7)
    assert made == [7, 7]
    assert largest <= 1 << 20 < 500 * 4000
    for place in (0, 5, 6):
        d, who, w = scores[place]
        _, index = np.unique(who, return_inverse=True)
        drawn = np.random.default_rng(7).integers(index.max() + 1, size=(500, index.max() + 1))
        means = np.bincount(index, d)[drawn].sum(1) / np.bincount(index, w)[drawn].sum(1)
        assert intervals[place] == pytest.approx(np.quantile(means, [0.025, 0.975]))


@pytest.mark.parametrize("test", [paired_t_test, wilcoxon_test])
def test_rejects(test):
    with pytest.raises(ValueError, match="one length"):
        test([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="finite"):
        test([1.0, math.nan], [1.0, 2.0])


def test_bootstrap_is_by_patient():
    """Ten copies of each patient's case are no more evidence than one."""
    d = np.array([0.1, 0.3, -0.05, 0.2, 0.0])
    patients = list("abcde")
    once = bootstrap_interval(d, patients, seed=3)
    assert bootstrap_interval(np.tile(d, 10), patients * 10, seed=3) == pytest.approx(once)
    assert bootstrap_interval(np.repeat(d, 10), np.repeat(patients, 10), seed=3) == pytest.approx(once)
    pretended = bootstrap_interval(np.tile(d, 10), [str(i) for i in range(50)], seed=3)
    assert pretended[1] - pretended[0] < 0.6 * (once[1] - once[0])
    assert once[0] < d.mean() < once[1]
    assert bootstrap_interval(d, patients, seed=3) == once
    assert all(math.isnan(end) for end in bootstrap_interval([0.1, 0.2], ["a", "a"]))


def test_weights_are_those_of_a_mean_of_ratios():
    """Of shares, weighed by what they are shares of, it is the interval of the pooled share: as if each was many."""
    shares, weights, patients = [0.0, 0.5, 1.0], [1, 2, 3], ["a", "b", "c"]
    many = bootstrap_interval(np.repeat(shares, weights), np.repeat(patients, weights))
    assert bootstrap_interval(shares, patients, weights=weights) == pytest.approx(many)
    assert bootstrap_interval(shares, patients, weights=[1, 1, 1]) == bootstrap_interval(shares, patients)
    assert all(math.isnan(end) for end in bootstrap_interval(shares, patients, weights=[1, 0, 0]))
    assert bootstrap_interval([math.nan, *shares], ["z", *patients], weights=[0, *weights]) == pytest.approx(many)


def test_bootstrap_covers():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(0.5, 1, 30), [str(i) for i in range(30)], resamples=500)
        hits += low <= 0.5 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_leaves_the_global_generator_alone():
    np.random.seed(5)
    want = np.random.random()
    np.random.seed(5)
    bootstrap_interval([0.1, 0.2, 0.3], ["a", "b", "c"])
    assert np.random.random() == want


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_compare_pairs_by_case_whatever_the_order(tmp_path):
    a = table(tmp_path / "a.csv", {"x": 0.7, "y": 0.8, "z": 0.6})
    b = table(tmp_path / "b.csv", {"z": 0.7, "x": 0.9, "y": 0.8})
    rows = {row.metric: row for row in compare_runs(a, b)}
    dsc = rows["dsc"]
    assert dsc.difference == pytest.approx(0.1)
    assert dsc.t_test.p == pytest.approx(stats.ttest_rel([0.9, 0.8, 0.7], [0.7, 0.8, 0.6]).pvalue)
    assert dsc.effect_size == pytest.approx(1.0)
    assert dsc.low <= dsc.difference <= dsc.high
    assert dsc.p_holm >= dsc.t_test.p
    text = format_comparison(list(rows.values()), "one run", "another")
    assert "A: one run" in text
    assert STRICT.describe() in text
    assert "+0.1" in text
    assert "nan" not in text
    write_comparison_table(tmp_path / "c.csv", list(rows.values()))
    lines = (tmp_path / "c.csv").read_text().splitlines()
    assert len(lines) == 1 + len(STRICT.metrics)
    assert lines[0].startswith("class_name,metric,count")
    assert all(line.endswith(STRICT.label) for line in lines[1:])


def test_the_scar_comes_first_and_speaks_for_two_runs(tmp_path):
    scores = {"blood pool": (0.9, 0.8), "scar": (0.25, 0.5)}
    tables = [tmp_path / name for name in ("a.csv", "b.csv")]
    for table, which in zip(tables, (0, 1), strict=True):
        values = {k: dict.fromkeys(STRICT.metrics, of[which]) for k, of in scores.items()}
        write_case_table(table, [Row(c, c, k, None, "ok", values[k], STRICT) for c in "xyz" for k in scores])
    rows = compare_runs(*tables)
    assert list(dict.fromkeys(one.class_name for one in rows)) == ["scar", "blood pool"]
    text = format_comparison(rows, "one", "another").splitlines()
    assert text[:3] == ["A: one", "B: another", "DSC of scar: A 0.250, B 0.500, B - A +0.250"]
    others = [one for one in rows if one.class_name != "scar"]
    both = [*others, *(replace(one, class_name="wall") for one in others)]
    assert not any("DSC of" in line for line in format_comparison(both, "one", "another").splitlines())


def test_unmatched_cases_are_an_error_that_lists_them(tmp_path):
    a = table(tmp_path / "a.csv", {"x": 0.7, "y": 0.8})
    b = table(tmp_path / "b.csv", {"x": 0.9, "w": 0.8, "v": 0.1})
    with pytest.raises(DataError, match=r"(?s)2 problems.*b\.csv: cases: .*y \(.*a\.csv: cases: .*v \(.*w \("):
        compare_runs(a, b)


def test_a_thousand_absent_cases_fit_on_a_screen(tmp_path):
    a = table(tmp_path / "a.csv", {f"case_{i}": 0.7 for i in range(1000)})
    b = table(tmp_path / "b.csv", {"x": 0.7})
    with pytest.raises(DataError, match=r"case_0 \(.* and 992 more") as caught:
        compare_runs(a, b)
    assert len(str(caught.value)) < 800


def test_tables_under_different_conventions_are_not_compared(tmp_path):
    a = table(tmp_path / "a.csv", {"x": 0.7})
    b = table(tmp_path / "b.csv", {"x": 0.7}, conventions=Conventions("nnunet"))
    with pytest.raises(DataError, match=r"(?s)strict.*nnunet.*under one convention|nnunet.*under one convention"):
        compare_runs(a, b)


def test_undefined_scores_are_left_out_and_counted(tmp_path):
    a = table(tmp_path / "a.csv", {"x": 0.7, "y": math.nan, "z": 0.5})
    b = table(tmp_path / "b.csv", {"x": 0.8, "y": 0.9, "z": 0.5})
    row = compare_runs(a, b)[0]
    assert (row.t_test.count, row.undefined) == (2, 1)
    assert "left out" in format_comparison([row], "a", "b")


def test_cases_of_one_patient_are_named_beside_the_tests_that_take_them_as_independent(tmp_path):
    """Counted where both runs have a score; where every pair has a patient of its own there is nothing to say."""
    scores = {"x_ED": 0.7, "x_ES": 0.8, "y_ED": 0.6, "y_ES": math.nan}
    patients = {case: case[0] for case in scores}
    of_two = {"x_ED": "x", "x_ES": "x2", "y_ED": "y", "y_ES": "y"}
    for whose, said in ((patients, "3 cases of 2 patients: cases of one patient are not independent"), (of_two, None)):
        a = table(tmp_path / "a.csv", scores, patients=whose)
        b = table(tmp_path / "b.csv", {case: 0.1 + score**2 for case, score in scores.items()}, patients=whose)
        rows = compare_runs(a, b)
        text = format_comparison(rows, "a", "b")
        report = write_report(
            tmp_path,
            title="t",
            evaluations=[Evaluation("test", "Test", read_case_table(a))],
            comparisons=[ComparisonSection("a", "b", rows)],
        ).read_text()
        for shown in (text, report):
            assert ("not independent" in shown) == (said is not None)
            assert said is None or said in shown


def test_slices_are_averaged_to_their_case_first(tmp_path):
    def slices(path, shift):
        rows = [
            Row(c, c, "atrium", i, "ok", dict.fromkeys(STRICT.metrics, base + shift * base), STRICT)
            for c, base in (("x", 0.5), ("y", 0.6), ("z", 0.9))
            for i in range(40)
        ]
        write_case_table(path, rows)
        return path

    row = compare_runs(slices(tmp_path / "a.csv", 0.0), slices(tmp_path / "b.csv", 0.1))[0]
    assert row.t_test.count == 3


def test_t19_one_case_gives_no_p_value_and_no_crash(tmp_path):
    a, b = table(tmp_path / "a.csv", {"x": 0.7}), table(tmp_path / "b.csv", {"x": 0.8})
    rows = compare_runs(a, b)
    assert math.isnan(rows[0].t_test.p)
    assert math.isnan(rows[0].wilcoxon.p)
    assert "nan" not in format_comparison(rows, "a", "b")


def test_p_values_are_printed_as_people_do():
    assert [format_p(p) for p in (0.0, 0.0009, 0.0123, 1.0)] == ["< 0.001", "< 0.001", "0.012", "1.000"]
