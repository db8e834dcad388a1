"""What the benchmarks and the report decide by the device, when they are imported and when they run."""

from __future__ import annotations

import sys

import stand_in_gpu
import torch

from trifuse.benchmarks import bench_dino_unet
from trifuse.benchmarks.baselines import dilated_attention, memory_efficient_attention
from trifuse.benchmarks.reporting import report


def test_networks_are_timed_in_bfloat16_and_without_a_cache_of_features():
    assert bench_dino_unet.encoder_dtype() == torch.bfloat16
    assert list(bench_dino_unet.TRAINING_STEP.missing) == ["trifuse, features from the cache"]
    assert list(bench_dino_unet.ENCODER.missing) == ["trifuse, weights in bfloat16"]


def test_peers_for_gpus_are_asked(monkeypatch):
    assert dilated_attention.FLEX_MISSING == ""
    monkeypatch.setattr(dilated_attention.importlib.util, "find_spec", lambda name: object())
    assert dilated_attention._natten_obstacle() == ""
    monkeypatch.setattr(memory_efficient_attention, "attention_by_xformers", lambda q, k, v: q + k + v)
    assert memory_efficient_attention.xformers_obstacle() == ""

    def broken(*_):
        raise NotImplementedError("no kernel\nfor it")

    monkeypatch.setattr(memory_efficient_attention, "attention_by_xformers", broken)
    assert memory_efficient_attention.xformers_obstacle() == "xformers cannot attend here: no kernel"


def test_a_report_on_a_gpu_gives_its_parts_their_share_of_eight_minutes(monkeypatch, tmp_path):
    parts = [report.Part(name, (sys.executable, "-V"), share) for name, share in (("one", 1.0), ("other", 3.0))]
    monkeypatch.setattr(report, "parts", lambda *_, **__: parts)
    assert report.main(["--out", str(tmp_path)]) == 0
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "report.md").read_text().splitlines()
    ]
    assert ["device", stand_in_gpu.NAME] in rows
    assert [(row[0], row[1], row[3]) for row in rows if row[:1] == ["one"]] == [("one", "0", "120")]
