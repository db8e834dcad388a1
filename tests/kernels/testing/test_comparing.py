"""A comparison judges before it times, and shows and keeps what it measured."""

from __future__ import annotations

import json

import pytest
import torch

from trifuse.kernels.testing import Case, Comparison, Pass, Timing, WrongResult, compare, comparing


def scaled(x, scale):
    return x.exp() * scale


def scaled_in_another_order(x, scale):
    return scale * x.exp()


@pytest.fixture(scope="module")
def comparison():
    x, scale = torch.ones(64, 32, requires_grad=True), torch.ones(32)
    forms = {"eager": scaled, "other": scaled_in_another_order}
    return compare("scaled exp", forms, x, scale, least_bytes=2 * x.nbytes, flops=2 * x.numel(), seconds=0.01)


def test_compare_times_both_passes(comparison):
    rows = {(row["pass"], row["provider"]): row for row in comparison.rows}
    assert list(rows) == [(timed, form) for timed in ("forward", "forward + backward") for form in ("eager", "other")]
    for (timed, form), row in rows.items():
        assert 0 < row["fifth_ms"] <= row["median_ms"] <= row["four_fifths_ms"]
        assert row["rounds"] >= 7
        assert (row["speedup"] == 1.0) or form == "other"
        assert (row["saved_mib"] is None) == (timed == "forward")
        for rate, work in (("gb_per_s", 2 * 64 * 32 * 4), ("gflop_per_s", 2 * 64 * 32)):
            assert row[rate] == (pytest.approx(work / row["median_ms"] / 1e6, rel=2e-3) if timed == "forward" else None)
    saved_mib = rows["forward + backward", "eager"]["saved_mib"]
    assert saved_mib == pytest.approx(64 * 32 * 4 / 2**20, rel=1e-3)  # the exponential; not the argument beside it


def test_the_speedup_is_that_over_the_first_form(monkeypatch):
    timings = {"slow": Timing((2.0, 4.0), 0), "fast": Timing((1.0, 2.0), 0)}
    monkeypatch.setattr(comparing, "measure", lambda candidates, **options: timings)
    rows = compare("doubling", {"slow": lambda x: x + x, "fast": lambda x: 2 * x}, torch.ones(3)).rows
    assert {row["provider"]: row["speedup"] for row in rows} == {"slow": 1.0, "fast": 2.0}


def test_compare_shows_and_keeps_what_it_measured(comparison, tmp_path):
    text = str(comparison)
    assert "**scaled exp, (64,32) float32, (32) float32, forward**" in text
    assert f"Measured on {comparison.record()['stamp']['device']}" in text
    path = comparison.write(tmp_path / "new")
    assert [path.name] == [path.name for path in path.parent.iterdir()] == ["scaled_exp.cpu.json"]
    assert json.loads(path.read_text()) == json.loads(json.dumps(comparison.record()))


def test_compare_refuses_a_wrong_form():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(WrongResult, match="other: the result differs"):
        compare("doubling", {"eager": lambda x: 2 * x, "other": lambda x: 2.001 * x}, x, seconds=0.01)
    with pytest.raises(WrongResult, match="other: gradient 0 differs"):
        compare("doubling", {"eager": lambda x: 2 * x, "other": lambda x: x + x.detach()}, x, seconds=0.01)


def test_forms_whose_results_differ_in_type_receive_the_same_incoming_gradients():
    """Rounded to bfloat16 for one of them alone, they would let its float32 gradients pass for wrong ones."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    gate = torch.ones(64, requires_grad=True)
    # ours, for a form of others is excused
    forms = {"wide": lambda x, gate: x.float() * gate, "trifuse": lambda x, gate: (x.float() * gate).bfloat16()}
    comparison = compare("gate", forms, x, gate, kernels=False, seconds=0.01)
    assert comparison.refused == []


def test_compare_takes_another_truth():
    """One that every form misses: nothing is timed, and each says so."""
    with pytest.raises(WrongResult, match="eager: the result differs"):
        compare("doubling", {"eager": lambda x: 2 * x}, torch.ones(3), truth=lambda x: 3 * x, seconds=0.01)


def test_the_first_form_in_float64_is_the_truth():
    seen = []
    compare("seen", {"eager": lambda x, n: seen.append(x[0].dtype) or x[0] * n}, [torch.ones(3)], 2, seconds=0)
    assert seen[0] == torch.float64
    assert set(seen[1:]) == {torch.float32}


def test_forms_may_return_several_tensors():
    x = torch.ones(3, requires_grad=True)
    forms = {"one": lambda x: (x * 2, x.detach() + 1), "two": lambda x: [x + x, 1 + x.detach()]}
    assert len(compare("two results", forms, x, seconds=0).rows) == 4
    with pytest.raises(WrongResult, match="two: result 1 differs"):
        compare("two results", {**forms, "two": lambda x: [x + x, x.detach()]}, x, seconds=0)


def test_a_form_that_fails_does_not_keep_the_others_from_being_timed():
    def fails(x):
        raise RuntimeError("no such kernel\nand many more lines")

    one = Comparison(
        name="one fails",
        cases=[Case("three", lambda device: (torch.ones(3),))],
        passes=[Pass("forward")],
        providers={"sound": lambda x: x + x, "failing": fails, "no tensor": lambda x: "text"},
        truth=lambda x: 2 * x,
    )
    case, timed = one.cases[0], one.passes[0]
    assert one.timing(case, timed, "sound", seconds=0).median > 0
    with pytest.raises(RuntimeError, match="no such kernel"):
        one.timing(case, timed, "failing", seconds=0)
    assert [row["provider"] for row in one.rows] == ["sound"]
    assert [row["provider"] for row in one.record()["refused"]] == ["failing", "no tensor"]
    assert "Refused: failing: RuntimeError: no such kernel; no tensor: TypeError: expected a tensor" in str(one)


def test_nothing_measured_leaves_no_file(tmp_path):
    assert Comparison("empty", [], [], {"one": torch.exp}, torch.exp).write(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "noise", "refused"),
    [
        (torch.float32, 1e-6, False),
        (torch.float32, 1e-4, True),
        (torch.bfloat16, 1e-3, False),
        (torch.bfloat16, 1e-1, True),
        (torch.float64, 1e-9, True),
    ],
)
def test_judge(dtype, noise, refused):
    truth = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = (truth * (1 + noise)).to(dtype)
    if refused:
        with pytest.raises(WrongResult, match="form: the result differs"):
            comparing.judge("form", [got], [truth])
    else:
        comparing.judge("form", [got], [truth])


@pytest.mark.parametrize(("name", "refused"), [("sum", False), ("trifuse", True)])
def test_gradients_of_others_may_come_through_a_narrow_result(name, refused):
    """What people write rounds its weights to the maps' type; our float32 gradients stay float32's."""
    truth = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = [truth.bfloat16(), (truth * (1 + 1e-3)).float()]
    if refused:
        with pytest.raises(WrongResult, match=r"trifuse: gradient 0 differs from the truth by 0\.001"):
            comparing.judge(name, got, [truth, truth])
    else:
        comparing.judge(name, got, [truth, truth])
    with pytest.raises(WrongResult, match="gradient 0 differs"):
        comparing.judge(name, [got[0], (truth * 1.1).float()], [truth, truth])
    with pytest.raises(WrongResult, match="gradient 0 differs"):
        comparing.judge(name, [truth.float(), got[1]], [truth, truth])


def test_judge_refuses_nan_shapes_and_labels():
    truth = torch.ones(4)
    with pytest.raises(WrongResult, match="differs"):
        comparing.judge("form", [truth * torch.nan], [truth])
    with pytest.raises(WrongResult, match=r"shape \(4, 1\), expected \(4,\)"):
        comparing.judge("form", [truth[:, None]], [truth])
    with pytest.raises(WrongResult, match="expected 2 tensors, got 1"):
        comparing.judge("form", [truth], [truth, truth])
    labels = torch.zeros(10_000, dtype=torch.uint8)
    few, many = labels.clone(), labels.clone()
    few[:5], many[:50] = 1, 1
    comparing.judge("form", [few], [labels])
    with pytest.raises(WrongResult):
        comparing.judge("form", [many], [labels])


def test_stamp_names_the_machine_and_its_ceilings(comparison):
    stamp = comparison.record()["stamp"]
    assert stamp["torch"] == torch.__version__
    assert stamp["device"].endswith(" cores")
    assert stamp["copy_gb_per_s"] > 0
    assert stamp["float32_gflop_per_s"] > 0
