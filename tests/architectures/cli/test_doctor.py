"""``trifuse doctor``: operators, what was tuned, and what networks cost."""

from __future__ import annotations

import json

import pytest
import torch
from command import run_main

from trifuse.architectures.cli import installation
from trifuse.kernels import library
from trifuse.kernels.gpu import tuning


def test_doctor_says_what_was_tuned_and_whether_a_kernel_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRIFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_remembered", None)
    monkeypatch.setattr(installation, "_gpus", lambda: [torch.device("cpu")])  # the trial itself, on a CPU
    output = run_main(["doctor"], capsys)[1]
    assert f"choices kept in {tmp_path}/tuning.json: none; trifuse.kernels.warm_up" in output
    assert "no kernel runs on cpu: CPU tensors use plain PyTorch" in output
    monkeypatch.setattr(tuning, "_remembered", {"a": {"threads": 64}})
    monkeypatch.setattr(installation, "default_backend", lambda *_: ("triton", ""))
    output = run_main(["doctor"], capsys)[1]
    assert f"choices kept in {tmp_path}/tuning.json: 1\n" in output
    assert "a kernel ran on cpu" in output


def test_doctor_says_that_the_trial_s_own_kernel_cannot_be_built(monkeypatch):
    monkeypatch.setattr(library, "_unusable", {("upsample_argmax", torch.device("cpu")): "no C compiler"})
    monkeypatch.setattr(installation, "_gpus", lambda: [torch.device("cpu")])
    with library.compiled_on_cpu():  # as on a GPU
        findings = installation.examine()
    assert "no kernel runs on cpu: no C compiler" in findings["triton"]
    reasons = {row["reason"] for row in findings["operators"] if row["operator"] == "upsample_argmax"}
    assert reasons == {"no C compiler"}


def test_doctor_names_every_operator_and_its_reason(capsys):
    code, output, _ = run_main(["doctor", "--json"], capsys)
    findings = json.loads(output)
    assert code == 0
    assert {row["operator"] for row in findings["operators"]} >= {"weighted_block_fusion", "memory_efficient_attention"}
    assert all(row["reason"] for row in findings["operators"])


def test_doctor_says_whether_the_installed_versions_were_tested(capsys, monkeypatch):
    versions = {"torch": "2.10.0+cu128", "triton": "3.6.0", "numpy": "2.4.0"}
    verdict = {"torch": "2.10.0", "triton": "3.6.0", "others": "", "passed": "1700", "failed": "0", "skipped": "90"}
    call = {"operator": "channel_gate", "launches": "3", "verdict": "sound", "torch": "2.10.0", "triton": "3.6.0"}
    others = verdict | {"others": "newest", "passed": "800"}
    files = {installation.VERSIONS: [verdict, others], installation.VIRTUAL_GPU: [call]}
    stamp = {"commit": "0123abc", "date": "2026-01-31"}
    monkeypatch.setattr(installation, "_version", lambda package: versions.get(package))
    monkeypatch.setattr(installation, "read_verdicts", lambda file: [row | stamp for row in files[file]])
    findings = installation.examine()["tested"]
    assert findings["versions"].startswith("torch 2.10.0 with triton 3.6.0: 1700 tests passed, none failed")
    assert findings["other packages"].startswith("at the newest, torch 2.10.0: 800 tests passed, none failed")
    assert findings["numpy"].endswith("does not work with numpy 2.4.0; run: pip install 'numpy<2.4'")
    assert findings["virtual GPU"].startswith("1 of 1 calls of 1 operators showed no fault on the virtual GPU")
    assert findings["without kernels"].startswith("dilated_attention_weights, memory_efficient_attention: no kernel")
    assert findings["note"].startswith("verdicts hold for the commit named")
    assert findings["versions"] in run_main(["doctor"], capsys)[1]
    versions["numpy"], files[installation.VIRTUAL_GPU], files[installation.VERSIONS] = "2.3.5", [], [verdict]
    assert installation.examine()["tested"].keys() == {"versions", "note"}


def test_doctor_shows_the_operators_that_run_alike_on_one_line(capsys, monkeypatch):
    def backend_of(device, dtype, name):
        by_hand = name == "channel_gate" and dtype == torch.float16
        return ("triton", "as told") if by_hand else ("torch", "as told")

    def operators():
        _, told = run_main(["doctor"], capsys)[1].split("\noperators\n")
        return [" ".join(line.split()) for line in told.splitlines()]

    monkeypatch.setattr(installation, "attention_backend", lambda device, dtype: ("sdpa", "no kernels"))
    assert operators() == [
        "cpu float32, bfloat16, float16 sdpa: no kernels (memory_efficient_attention)",
        "cpu float32, bfloat16, float16 torch: CPU tensors use plain PyTorch (all others)",
    ]
    monkeypatch.setattr(installation, "default_backend", backend_of)
    monkeypatch.setattr(installation, "attention_backend", lambda device, dtype: ("torch", "as told"))
    assert operators() == [
        "cpu float32, bfloat16 torch: as told (channel_gate)",
        "cpu float16 triton: as told (channel_gate)",
        "cpu float32, bfloat16, float16 torch: as told (all others)",
    ]
    monkeypatch.setattr(installation, "default_backend", lambda *_: ("torch", "as told"))
    assert operators() == ["cpu float32, bfloat16, float16 torch: as told (all operators)"]


def test_doctor_says_whether_a_compiler_for_the_virtual_gpu_is_there(capsys, monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    for code, said in ((0, f"C++ compiler       {compiler}\n"), (1, "compiles no C++20; the virtual GPU needs g++ 10")):
        compiler.write_text(f"#!/bin/sh\nexit {code}\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))
        assert said in run_main(["doctor"], capsys)[1]
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert "C++ compiler       none; the virtual GPU needs" in run_main(["doctor"], capsys)[1]


def test_doctor_knows_a_pair_that_was_not_tested(monkeypatch):
    monkeypatch.setattr(installation, "_version", lambda package: {"torch": "2.11.0", "numpy": "2.4.0"}.get(package))
    found = installation.examine()["tested"]
    assert found["versions"].startswith("torch 2.11.0 with triton none is not among the tested pairs: ")
    assert "numpy" not in found


@pytest.mark.parametrize(("network", "millions"), [("taff_unet", "34,816,671"), ("plain_unet", "33,474,840")])
def test_doctor_counts_the_networks(network, millions, capsys):
    code, output, _ = run_main(["doctor", "--model", network], capsys)
    assert code == 0
    assert millions in output
