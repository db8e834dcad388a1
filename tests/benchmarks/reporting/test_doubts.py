"""A result file of a GPU that shows plain PyTorch under our name is found out."""

from __future__ import annotations

import json

import pytest

from trifuse.benchmarks.reporting.doubts import doubts

ROW = {"case": "tiny", "pass": "forward", "launches": None}
SOUND = {
    "benchmark": "fusion",
    "kernels": True,
    "stamp": {"fallbacks": {}},
    "rows": [{**ROW, "provider": "eager"}, {**ROW, "provider": "torch.compile of trifuse", "launches": 2}],
}
CURVE = {"name": "fusion", "axis": "batch"}


@pytest.fixture
def doubts_about(tmp_path):
    def doubts_about(kind="cuda", **changes):
        path = tmp_path / f"fusion.{kind}.json"
        path.write_text(json.dumps({**SOUND, **changes}))
        return [doubt.removeprefix(f"{path.name}: ") for doubt in doubts(path)]

    return doubts_about


def test_kernels_that_ran_leave_no_doubt(doubts_about):
    assert doubts_about() == []
    assert doubts_about(rows=[], curves=[{**CURVE, "launches": [3, 3]}, {**CURVE, "launches": None}]) == []


def test_a_fallback_is_told_on_every_device(doubts_about):
    stamp = {"fallbacks": {"upsample_argmax": "cuda:0: no C compiler"}}
    for kind in ("cuda", "cpu"):
        assert doubts_about(kind, stamp=stamp) == [
            "upsample_argmax fell back to plain PyTorch on cuda:0: no C compiler"
        ]


@pytest.mark.parametrize("launches", [{"launches": 0}, {"launches": None}, {}], ids=str)
def test_a_row_of_ours_without_launches_is_told(doubts_about, launches):
    row = {"case": "tiny", "pass": "forward", "provider": "trifuse", **launches}
    assert doubts_about(rows=[row]) == ["trifuse (tiny, forward) launched no kernel"]
    assert doubts_about(rows=[row], kernels=False) == []
    assert doubts_about("cpu", rows=[row]) == []


@pytest.mark.parametrize("launches", [{"launches": [1, 0]}, {}], ids=str)
def test_a_curve_without_launches_is_told(doubts_about, launches):
    assert doubts_about(curves=[{**CURVE, **launches}]) == ["fusion against batch launched no kernel"]


def test_a_gpu_s_file_that_says_nothing_of_fallbacks_is_told(doubts_about):
    assert doubts_about(stamp={}) == ["it does not say whether operators fell back to plain PyTorch"]
    assert doubts_about("cpu", stamp={}) == []
