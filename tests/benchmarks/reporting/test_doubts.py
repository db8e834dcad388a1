"""A result file of a GPU that shows plain PyTorch under our name is found out."""

from __future__ import annotations

import json

import pytest

from trifuse.benchmarks.reporting.doubts import doubts

ROW = {"case": "tiny", "pass": "forward", "launches": None}
SOUND = {
    "benchmark": "fusion",
    "kernels": True,
    "stamp": {"backend": "triton", "fallbacks": {}},
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
    stamp = {"backend": "triton", "fallbacks": {"upsample_argmax": "cuda:0: no C compiler"}}
    for kind in ("cuda", "cpu"):
        assert doubts_about(kind, stamp=stamp) == [
            "upsample_argmax fell back to plain PyTorch on cuda:0: no C compiler"
        ]


@pytest.mark.parametrize("launches", [{"launches": 0}, {"launches": None}, {}], ids=str)
@pytest.mark.parametrize("provider", ["trifuse", "torch.compile of trifuse"])
def test_a_row_of_ours_without_launches_is_told(doubts_about, launches, provider):
    row = {"case": "tiny", "pass": "forward", "provider": provider, **launches}
    assert doubts_about(rows=[row]) == [f"{provider} (tiny, forward) launched no kernel"]
    assert doubts_about(rows=[row], kernels=False) == []
    assert doubts_about("cpu", rows=[row]) == []


@pytest.mark.parametrize("launches", [{"launches": [1, 0]}, {"launches": []}, {}], ids=str)
def test_a_curve_without_launches_is_told(doubts_about, launches):
    assert doubts_about(curves=[{**CURVE, **launches}]) == ["fusion against batch launched no kernel"]


@pytest.mark.parametrize("kind", ["cuda", "CUDA"])
@pytest.mark.parametrize("stamp", [{"backend": "triton"}, {"backend": "triton", "fallbacks": None}], ids=str)
def test_a_gpu_s_file_that_says_nothing_of_fallbacks_is_told(doubts_about, stamp, kind):
    assert doubts_about(kind, stamp=stamp) == ["it does not say whether operators fell back to plain PyTorch"]
    assert doubts_about("cpu", stamp=stamp) == []


def test_a_gpu_s_file_without_forced_kernels_is_told(doubts_about):
    for stamp, got in (({"fallbacks": {}}, None), ({"backend": "torch", "fallbacks": {}}, "torch")):
        said = f"its kernels were not forced: expected the backend triton, got {got}"
        assert doubts_about(stamp=stamp) == [said]
        assert doubts_about("cpu", stamp=stamp) == []
    assert len(doubts_about(stamp=None)) == 2


def test_a_gpu_s_file_without_measurements_is_told(doubts_about):
    assert doubts_about(rows=[]) == ["it holds no measurement"]
    assert doubts_about("cpu", rows=[]) == []


def test_a_file_of_something_else_is_told(tmp_path):
    path = tmp_path / "fusion.cuda.json"
    path.write_text("[]")
    expected = "fusion.cuda.json: it is no result file: it holds a list where an object is expected"
    assert doubts(path) == [expected]
