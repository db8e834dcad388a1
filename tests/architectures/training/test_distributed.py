"""Two ranks are one: the same numbers, and one end for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from children import run_ranks
from ready_python import run_python
from safetensors.torch import load_file
from tiny_run import StopAt, TinyConfig, TinyNet, assert_same_run, run

from trifuse.architectures.training.distributed import World, open_world
from trifuse.architectures.training.signals import Interrupted
from trifuse.kernels.errors import TrifuseError

PROGRAM = Path(__file__).parents[2] / "support" / "tiny_run.py"


def rank() -> int:
    return int(os.environ["RANK"])


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"batch_dice": True, "length": 8}),
        (2, {"batch_dice": True, "length": 11, "grad_clip": 0.3, "ema_decay": 0.9}),
        (2, {"batch_dice": False, "length": 9, "accumulate": 2, "optimizer": "sgd"}),
        (3, {"batch_dice": True, "length": 10}),
    ],
    ids=["even", "uneven last batch", "a last micro-batch of one", "a rank that never has a sample"],
)
def test_ranks_equal_one_t12(tmp_path, ranks, options):
    """Ten steps or more on the same global batches; Dice pooled over ranks, and an uneven end in every way."""
    options = {"epochs": 5, "batch_size": 4, "norm": "group"} | options
    run(tmp_path / "one", **options)
    assert run_ranks(lambda: run(tmp_path / "several", **options), ranks) == [0] * ranks
    assert_same_run(tmp_path / "one", tmp_path / "several")


def test_one_rank_started_from_other_weights_takes_those_of_rank_0(tmp_path):
    def work():
        model = TinyNet()
        if rank() == 1:
            torch.nn.init.zeros_(model.body.weight)
        run(tmp_path / "two", model=model)

    run(tmp_path / "one")
    assert run_ranks(work) == [0, 0]
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_only_rank_0_speaks_and_all_return_the_same_result(tmp_path, capfd):
    def work():
        result = run(tmp_path / "run", epochs=2, lr=0.05)
        (tmp_path / f"result_{rank()}").write_text(repr(result))

    assert run_ranks(work) == [0, 0]
    assert (tmp_path / "result_0").read_text() == (tmp_path / "result_1").read_text()
    assert capfd.readouterr().out.count("epoch 1, step") == 1


def test_t13_resumed_with_another_number_of_ranks(tmp_path, capfd):
    """Two ranks until a signal, one until another, then two again."""
    options = {"epochs": 4, "norm": "group", "ema_decay": 0.9}
    run(tmp_path / "one", **options)

    class StopOneRank(StopAt):
        def __call__(self, model, batch):
            return (
                super().__call__(model, batch) if rank() == int(os.environ["WORLD_SIZE"]) - 1 else model(batch["image"])
            )

    assert run_ranks(lambda: run(tmp_path / "two", **options, forward=StopOneRank(4))) == [75, 75]
    assert json.loads((tmp_path / "two/last/training_state.json").read_text())["position"]["step"] == 4
    assert run_ranks(lambda: run(tmp_path / "two", **options, forward=StopOneRank(3), resume=True), ranks=1) == [75]
    assert "resuming after step 4 (epoch 2, step 1); ranks: 2 before, 1 now" in capfd.readouterr().out
    assert run_ranks(lambda: run(tmp_path / "two", **options, resume=True)) == [0, 0]
    assert "resuming after step 7 (epoch 3, step 1); ranks: 1 before, 2 now" in capfd.readouterr().out
    assert_same_run(tmp_path / "one", tmp_path / "two")
    sessions = [json.loads(line) for line in (tmp_path / "two" / "sessions.jsonl").read_text().splitlines()]
    assert [(session["ranks"], session["steps_done"]) for session in sessions] == [(2, 0), (1, 4), (2, 7)]


def test_t6_all_ranks_stop_at_a_nan_and_each_says_what_it_saw(tmp_path):
    assert run_ranks(lambda: run(tmp_path, poison=3, epochs=1, batch_size=10)) == [1, 1]
    reports = [json.loads((tmp_path / "crash" / f"step_0_rank_{r}.json").read_text()) for r in (0, 1)]
    seen = [report["first_non_finite"] for report in reports]
    poisoned = next(r for r in (0, 1) if [42, 0, 3] in reports[r]["sample_keys"])
    assert seen[poisoned] == "the input 'image'"
    assert seen[1 - poisoned].startswith("the loss or its gradient")


def test_t11_one_rank_fails_before_the_first_step_and_all_say_why(tmp_path):
    def work():
        try:
            with open_world("cpu") as world, world.raise_on_any_rank():
                if world.rank == 1:
                    raise TrifuseError("case_7: the affine is singular")
        except TrifuseError as error:
            (tmp_path / str(rank())).write_text(str(error))
            raise

    assert run_ranks(work) == [1, 1]
    assert (tmp_path / "1").read_text() == "case_7: the affine is singular"
    assert (tmp_path / "0").read_text() == "another rank failed: rank 1: case_7: the affine is singular"


def test_a_branch_that_only_one_rank_or_nobody_takes(tmp_path):
    """No rank waits for a gradient that another does not have: it counts as zero, or stays absent for all."""

    def forward(model, batch):
        outputs = model.head(model.encoder(batch["image"]))
        return outputs + model.body(batch["image"][:, :1].expand(-1, 4, -1, -1)).mean() if rank() else outputs

    def work():
        model = TinyNet()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        run(tmp_path, model=model, forward=forward, epochs=1)
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved == {"body.weight", "body.bias", "head.weight", "head.bias"}, moved

    assert run_ranks(work) == [0, 0]


def test_running_statistics_are_those_of_rank_0(tmp_path):
    def work():
        model = TinyNet(TinyConfig(norm="batch"))
        run(tmp_path / "run", model=model, epochs=1)
        torch.save(model.norm.running_mean, tmp_path / f"mean_{rank()}.pt")

    assert run_ranks(work) == [0, 0]
    means = [torch.load(tmp_path / f"mean_{r}.pt", weights_only=True) for r in (0, 1)]
    assert torch.equal(*means)
    assert torch.equal(means[0], load_file(tmp_path / "run/last/model.safetensors")["norm.running_mean"])


def test_sum_is_differentiable():
    def work():
        with open_world("cpu") as world:
            own = torch.tensor([1.0 + rank()], requires_grad=True)
            total = world.sum(own)
            total.square().sum().backward()
            parameter = torch.nn.Parameter(torch.ones(1))
            parameter.grad = own.grad * (rank() + 1)
            world.sum_gradients([parameter])
            assert float(total) == 3
            assert float(own.grad) == 6  # d (a + b)**2 / da
            assert float(parameter.grad) == 6 * 1 + 6 * 2
            with open_world("cpu") as again:
                assert again == world

    assert run_ranks(work) == [0, 0]


def test_summed_gradients_lie_as_their_parameters_do():
    """Fused optimisers, which are those of a GPU, take no others."""

    def work():
        with open_world("cpu") as world:
            weight = torch.nn.Parameter(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last))
            weight.grad = torch.arange(120.0).view(2, 3, 4, 5)
            world.sum_gradients([weight])
            assert weight.grad.stride() == weight.stride()
            assert torch.equal(weight.grad, 2 * torch.arange(120.0).view(2, 3, 4, 5))

    assert run_ranks(work) == [0, 0]


NO_THREAD_IS_LEFT = """
from pathlib import Path
from trifuse.architectures.training.distributed import dist

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import torch.distributed.nn.functional  # as compilation does
dist.destroy_process_group()
names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in names if "gloo" in name], names
"""


def test_no_thread_of_a_world_is_left_to_run_into_the_end_of_the_process():
    """What is imported while ranks are joined, as for compilation, must not hold them: the process might abort."""
    ended = run_python("-c", NO_THREAD_IS_LEFT)
    assert ended.returncode == 0, ended.stderr


def test_one_rank_alone_exchanges_nothing():
    world = World(0, 1, torch.device("cpu"))
    values = torch.ones(2)
    assert world.sum(values) is values
    assert world.any(True)
    assert not world.any(False)
    with pytest.raises(ValueError, match="as it is"), world.raise_on_any_rank():
        raise ValueError("as it is")


def test_ranks_wait_for_each_other_as_long_as_a_validation_may_take(monkeypatch):
    asked = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda *_, timeout=None: asked.append(timeout))
    for name, answer in (("get_rank", 1), ("get_world_size", 2), ("destroy_process_group", None)):
        monkeypatch.setattr(dist, name, lambda answer=answer: answer)
    with open_world("cpu") as world:
        assert (world.rank, world.size) == (1, 2)
    assert asked == [timedelta(hours=2)]


def torchrun(out: Path, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(PROGRAM), str(out), json.dumps(options)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_t10_a_killed_rank_ends_the_whole_job_and_it_resumes(tmp_path):
    """Through the real launcher: rank 1 is killed in some epoch; one rank can go on from the last checkpoint."""
    options = {"epochs": 300, "checkpoint_every_steps": 2, "norm": "group", "lr": 1e-3}
    job = torchrun(tmp_path / "run", **options)
    log = tmp_path / "run" / "log.csv"
    end_s = time.monotonic() + 100
    while time.monotonic() < end_s and (not log.exists() or len(log.read_text().splitlines()) < 3):
        time.sleep(0.05)
    victim = int((tmp_path / "rank_1.pid").read_text())
    started_s = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    said, _ = job.communicate(timeout=60)
    assert job.returncode not in (0, None), said
    assert time.monotonic() - started_s < 60
    assert "resuming after step" not in said
    position = json.loads((tmp_path / "run" / "last" / "training_state.json").read_text())["position"]
    assert 0 < position["step"] < 900
    with pytest.raises(Interrupted, match=f"after step {position['step'] + 3};"):
        run(tmp_path / "run", **options, resume=True, forward=StopAt(3))
