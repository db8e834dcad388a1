"""Training, prediction and the command where there is a GPU."""

from __future__ import annotations

import json
import socket

import pytest
import torch
from children import Child
from command import ATRIA_TRAINING, run_main, with_options
from safetensors.torch import load_file
from stand_in_gpu.memory import Gpus
from tiny_run import run

from trifuse.architectures.data.layouts.split import write_split
from trifuse.architectures.data.phantoms.left_atrium import write_left_atrium_phantom
from trifuse.architectures.training.distributed import open_world
from trifuse.kernels.gpu import launching


def validate(model):
    """Say how bright the network's outputs are, on its own device."""
    device = next(model.parameters()).device
    return {"dice": float(model(torch.ones(1, 3, 8, 8, device=device)).softmax(1).mean())}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_the_gpu(tmp_path, precision):
    result = run(tmp_path / "run", device="auto", precision=precision, epochs=2, validate=validate, workers=0)
    assert result is not None
    assert all(
        tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / "last" / "model.safetensors").values()
    )


def test_it_trains_as_on_the_host(tmp_path):
    for device in ("cpu", "cuda"):
        run(tmp_path / device, device=device, precision="fp32", epochs=2, validate=validate)
    host, gpu = (load_file(tmp_path / device / "last" / "model.safetensors") for device in ("cpu", "cuda"))
    torch.testing.assert_close(gpu, host)


def test_workers_fill_pinned_memory(tmp_path):
    run(tmp_path / "run", device="cuda", epochs=1, workers=1, validate=validate)


def test_two_ranks_join_over_nccl(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def work():
        with open_world("cuda:0") as world:
            total = world.sum(torch.ones(2, device=world.device))
            assert (total.is_cuda, total.tolist()) == (True, [2.0, 2.0])

    monkeypatch.setattr(Gpus, "count", 2)
    other = Child(work, RANK="1", LOCAL_RANK="1", **shared)
    for name, value in {**shared, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    work()
    assert other.wait() == 0


def test_the_command_trains_and_predicts(tmp_path, capsys, monkeypatch):
    cohort, launches = tmp_path / "cohort", []
    launch = launching.launch
    monkeypatch.setattr(launching, "launch", lambda *a, **k: (launches.append(a[0]), launch(*a, **k)))
    cohort.mkdir()
    split = tmp_path / "split.json"
    write_split(split, write_left_atrium_phantom(cohort, cases=4, size=(24, 24, 2)))
    words = ["train", "dino_unet", cohort, "--out", tmp_path / "run", "--split", split, "--device", "cuda"]
    words += with_options(ATRIA_TRAINING, epochs=1, image_size=28)
    assert run_main(words, capsys)[0] == 0
    assert launches
    assert "stand-in GPU" in (tmp_path / "run" / "report.md").read_text()
    launches.clear()
    words = ["predict", tmp_path / "run", cohort, "--out", tmp_path / "labels", "--device", "cuda"]
    assert run_main(words, capsys)[0] == 0
    assert launches
    assert list((tmp_path / "labels").glob("*.nii.gz"))


def test_the_doctor_runs_a_kernel(capsys):
    code, output, _ = run_main(["doctor", "--json"], capsys)
    findings = json.loads(output)
    assert (code, findings["machine"]["gpus"]) == (0, "stand-in GPU")
    assert "a kernel ran on cuda:0" in findings["triton"]
    on_gpu = {row["operator"]: row["backend"] for row in findings["operators"] if row["device"] == "cuda:0"}
    assert {on_gpu.pop("memory_efficient_attention"), *on_gpu.values()} == {"sdpa", "triton"}
