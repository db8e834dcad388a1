"""A comparison judges before it times, counts what it says it counts, and shows and keeps what it measured."""

from __future__ import annotations

import json
import re
import subprocess
import weakref

import pytest
import torch
from torch import nn

from trifuse.kernels.testing import (
    Case,
    Comparison,
    Pass,
    WrongResult,
    compare,
    comparing,
    machine,
    saved_for_backward_bytes,
    tables,
)

FLOATS = 1000
BYTES = 4 * FLOATS


class Hidden(torch.autograd.Function):
    """Saves its result by the official way, and a copy of it behind autograd's back."""

    @staticmethod
    def forward(ctx, x):
        result = x + 1
        ctx.save_for_backward(result)
        ctx.copy = result.clone()
        return result

    @staticmethod
    def backward(ctx, grad):
        return grad


def used_twice(x, y):
    z = x.exp()
    return z * z.view(10, -1).view(-1)


def partly_thrown_away(x, y):
    x.exp().sin()
    return y.exp() + y


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, y: x + y, 0),
        (lambda x, y: x * y, 0),
        (lambda x, y: x.exp() + y, BYTES),
        (lambda x, y: x.exp().exp().exp(), 3 * BYTES),
        (lambda x, y: [x.exp(), (x * 2, y.exp())[1]], 2 * BYTES),
        (lambda x, y: Hidden.apply(x), BYTES),
        (lambda x, y: x.detach().exp() * y, BYTES),
        (used_twice, BYTES),
        (partly_thrown_away, BYTES),
        (lambda x, y: x.detach() + 1, 0),
    ],
    ids=["sum", "arguments", "result", "chain", "list", "own function", "detached", "twice", "thrown away", "nothing"],
)
def test_saved_bytes_of_known_cases(function, expected):
    x, y = (torch.ones(FLOATS, requires_grad=True) for _ in range(2))
    assert saved_for_backward_bytes(function, x, y) == expected


def test_counting_saved_bytes_leaves_none_behind():
    x = torch.ones(FLOATS, requires_grad=True)
    kept = []
    saved_for_backward_bytes(lambda x: kept.append(weakref.ref((x * 2).exp_())) or kept[-1](), x)
    assert kept[0]() is None


def test_parameters_and_nested_arguments_are_not_saved_bytes():
    layer = nn.Linear(10, 20)
    x = torch.ones(7, 10, requires_grad=True)
    assert saved_for_backward_bytes(lambda pair: layer(pair[0]), [x]) == 0
    assert saved_for_backward_bytes(lambda pair: layer(pair[0]).exp(), (x,)) == 7 * 20 * 4


# ------------------------------------------------------------------------------------------------------ compare


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


# -------------------------------------------------------------------------------------------------------- judging


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


# ------------------------------------------------------------------------------------------ the machine, the tables


def test_ceilings_are_measured_and_the_nearer_one_counts(monkeypatch):
    ceilings = {"copy_gb_per_s": 100.0, "float32_gflop_per_s": 1000, "bfloat16_gflop_per_s": 8000}
    monkeypatch.setattr(machine, "stamp", lambda device: ceilings)
    place, single, half = torch.device("cuda"), torch.float32, torch.bfloat16
    assert machine.share_of_ceiling(place, single, 50.0, 100.0) == 0.5
    assert machine.share_of_ceiling(place, single, 50.0, 700.0) == 0.7
    assert machine.share_of_ceiling(place, half, None, 2000.0) == 0.25
    assert machine.share_of_ceiling(place, half, None, None) is None
    monkeypatch.setitem(ceilings, "bfloat16_gflop_per_s", None)  # a CPU, where it is not measured
    assert machine.share_of_ceiling(place, half, None, 500.0) == 0.5


def test_stamp_names_the_machine_and_its_ceilings(comparison):
    stamp = comparison.record()["stamp"]
    assert stamp["torch"] == torch.__version__
    assert stamp["device"].endswith(" cores")
    assert stamp["copy_gb_per_s"] > 0
    assert stamp["float32_gflop_per_s"] > 0


def test_commit_is_that_of_the_measured_code(monkeypatch):
    monkeypatch.setenv("TRIFUSE_COMMIT", "0123abc")
    assert machine.identity(torch.device("cpu"))["commit"] == "0123abc"
    monkeypatch.delenv("TRIFUSE_COMMIT")
    monkeypatch.setattr(machine, "_said_by", lambda *command: "")  # not under git, or in another's repository
    assert machine.identity(torch.device("cpu"))["commit"].startswith("unknown, trifuse ")
    answers = {"ls-files": "machine.py", "status": " M machine.py", "rev-parse": "0123abcdef01"}
    monkeypatch.setattr(machine, "_said_by", lambda *command: answers[command[3]])
    assert machine.identity(torch.device("cpu"))["commit"] == "0123abcdef01+changes"


def test_results_that_are_written_change_nothing_that_is_measured(tmp_path, monkeypatch):
    def git(*words):
        author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *author, *words], check=True, capture_output=True)

    monkeypatch.delenv("TRIFUSE_COMMIT", raising=False)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "kernels" / "machine.py"))
    files = [tmp_path / "kernels" / "machine.py", tmp_path / "benchmarks" / "results" / "op.cpu.json"]
    git("init")
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("before")
    git("add", ".")
    git("commit", "-m", "a")
    files[1].write_text("measured")
    assert re.fullmatch("[0-9a-f]{12}", machine.commit())
    files[0].write_text("changed")
    assert machine.commit().endswith("+changes")


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (0, "0"), (0.00098, "0.001"), (0.0123, "0.012"), (1.234, "1.2"), (1234.5, "1234")]
)
def test_tables_show_the_digits_that_count(value, text):
    assert tables._digits(value, 2) == text


def test_tables_leave_empty_columns_out():
    lines = list(tables.table([["first", "", "1.0"], ["second one", "", ""]], ["form", "never", "ms"]))
    assert lines == ["| form       |  ms |", "| ---------- | --: |", "| first      | 1.0 |", "| second one |     |"]
