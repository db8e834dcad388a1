"""On a GPU a comparison forces our kernels, counts their launches, and refuses a form of ours that runs without."""

from __future__ import annotations

import json

import pytest
import torch
from unbuildable_kernels import NO_COMPILER, make_unbuildable

from trifuse.kernels import BackendError, library, weighted_block_fusion, weighted_block_fusion_reference
from trifuse.kernels.testing import Case, Comparison, NoKernelRan, Pass, compare

pytest.importorskip("triton", reason="these are Triton's launches")

FORWARD = Pass("forward")
BOTH = Pass("forward + backward", leaves=lambda features, logits: [logits, *features])


def arguments(device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 4, generator=generator) for _ in range(3)], torch.randn(3, generator=generator)


def fusion(**options):
    return Comparison(
        name="fusion",
        cases=[Case("tiny", arguments)],
        passes=[FORWARD, BOTH],
        providers={"eager": weighted_block_fusion_reference, "trifuse": weighted_block_fusion},
        truth=weighted_block_fusion_reference,
        **options,
    )


def timed(comparison, provider, *passes):
    for one in passes:
        comparison.timing(comparison.cases[0], one, provider, seconds=0)
    return {(row["pass"], row["provider"]): row for row in comparison.rows}


def test_rows_say_how_many_kernels_a_call_launches():
    comparison = fusion()
    with library.compiled_on_cpu():  # as on a GPU; the interpreter runs them
        rows = timed(comparison, "trifuse", FORWARD, BOTH)
        stamp = comparison.record()["stamp"]
    assert [rows[one.name, "trifuse"]["launches"] for one in (FORWARD, BOTH)] == [1, 3]
    assert {rows[one.name, "trifuse"]["backend"] for one in (FORWARD, BOTH)} == {"triton"}
    assert {rows[one.name, "eager"]["launches"] for one in (FORWARD, BOTH)} == {None}
    assert stamp["fallbacks"] == {}
    assert "| launches |" in str(comparison)


def test_on_a_cpu_plain_pytorch_is_what_is_timed():
    comparison = fusion()
    row = timed(comparison, "trifuse", FORWARD)["forward", "trifuse"]
    assert (row["launches"], row["backend"]) == (0, "torch")
    assert comparison.record()["stamp"]["backend"] == "torch"
    assert "| launches |" not in str(comparison)


def test_a_form_of_ours_is_refused_where_no_kernel_can_be_built(monkeypatch, tmp_path):
    make_unbuildable(monkeypatch)
    comparison = fusion()
    with pytest.raises(BackendError, match=NO_COMPILER):
        timed(comparison, "trifuse", FORWARD)
    record = json.loads(comparison.write(tmp_path).read_text())
    assert [row["provider"] for row in record["rows"]] == ["eager"]
    (refused,) = record["refused"]
    assert refused["provider"] == "trifuse"
    assert NO_COMPILER in refused["reason"]
    assert record["stamp"]["fallbacks"].keys() == {"weighted_block_fusion"}
    assert "**Kernels could not be built, and plain PyTorch took over: weighted_block_fusion on cpu" in str(comparison)


def test_a_form_of_ours_is_refused_where_it_launches_nothing():
    with library.compiled_on_cpu():
        with pytest.raises(NoKernelRan, match="trifuse: expected Triton kernels, but it launched none on cpu"):
            compare("doubling", {"eager": lambda x: 2 * x, "trifuse": lambda x: x + x}, torch.ones(3), seconds=0)
        other = {"eager": lambda x: 2 * x, "trifuse": lambda x: x + x}
        (_, row) = compare("doubling", other, torch.ones(3), kernels=False, seconds=0).rows
    assert (row["launches"], row["backend"]) == (0, "torch")


def test_a_form_of_ours_is_refused_where_another_operator_fell_back(monkeypatch):
    fallen = {("upsample_argmax", torch.device("cpu")): NO_COMPILER}
    monkeypatch.setattr(library, "_unusable", fallen)
    comparison = fusion()
    with library.compiled_on_cpu(), pytest.raises(NoKernelRan, match=f"upsample_argmax on cpu: {NO_COMPILER}"):
        timed(comparison, "trifuse", FORWARD)


def test_nothing_is_forced_upon_forms_that_are_not_ours(monkeypatch):
    seen = []
    with library.compiled_on_cpu():
        compare("seen", {"one": lambda x: seen.append(library.forced_backend()) or x}, torch.ones(3), seconds=0)
    assert set(seen) == {None}
