"""One optimiser step: its arithmetic, its precision, and numbers that are not finite."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_run import Squares, StopAt, TinyNet, bits, recipe, run
from torch import nn

from trifuse.architectures.storage.epoch_log import read_log
from trifuse.architectures.training.batches import keyed_seed, plan_epoch
from trifuse.architectures.training.signals import Interrupted
from trifuse.kernels.errors import NumericError
from trifuse.kernels.torch_internals import has_hooks


def test_two_steps_are_the_textbook_steps(tmp_path):
    """Two epochs of one step equal two steps written out by hand, weight decay and clipping included."""
    model = TinyNet()
    expected = copy.deepcopy(model)
    settings = {"epochs": 2, "batch_size": 10, "grad_clip": 0.1, "lr": 0.1, "schedule": "constant"}
    run(tmp_path, model=model, **settings)
    optimizer = torch.optim.AdamW([p for p in expected.parameters() if p.requires_grad], 0.1, weight_decay=1e-2)
    for epoch in range(2):
        samples = [Squares(10)[key] for key in plan_epoch(10, recipe(**settings), epoch, 0, 1)[0][0].keys]
        logits = expected(torch.stack([s["image"] for s in samples]))
        target = torch.stack([s["target"] for s in samples])
        p = logits.softmax(1)[:, 1]
        dice = (2 * (p * target).sum() + 1e-5) / (p.sum() + target.sum() + 1e-5)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(logits, target) - dice).backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("length", [8, 10, 11])
def test_accumulation_4x1_equals_1x4(tmp_path, length):
    """With a loss that is a mean over samples; the last step is uneven, and so is the last micro-batch."""
    models = TinyNet(), TinyNet(), TinyNet()
    for model, accumulate in zip(models, (1, 2, 4), strict=True):
        run(tmp_path / str(accumulate), model=model, accumulate=accumulate, batch_dice=False, length=length)
    for name, tensor in models[0].state_dict().items():
        for other in models[1:]:
            torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    losses = [read_log(tmp_path / str(a) / "log.csv")[-1]["loss"] for a in (1, 2, 4)]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_t6_nan_in_a_sample_stops_and_is_found(tmp_path, ema_decay):
    options = {"checkpoint_every_steps": 1, "epochs": 1, "batch_size": 1, "ema_decay": ema_decay}
    at = [key[0][2] for key in (s[0].keys for s in plan_epoch(10, recipe(**options), 0, 0, 1))].index(7)
    with pytest.raises(NumericError, match=rf"loss is not finite at step {at}; .*input 'image'.*\[7\].*case_7.*crash"):
        run(tmp_path, poison=7, **options)
    (path,) = (tmp_path / "crash").iterdir()
    report = json.loads(path.read_text())
    assert report["sample_keys"] == [[42, 0, 7]]
    assert report["case_ids"] == ["case_7"]
    assert json.loads((tmp_path / "last" / "training_state.json").read_text())["position"]["step"] == at
    assert all(p.isfinite().all() for p in TinyNet.from_pretrained(tmp_path / "last").parameters())


def test_t6_nan_in_a_later_micro_batch_is_found_there(tmp_path):
    options = {"epochs": 1, "accumulate": 2}
    first, second = (micro.keys for micro in plan_epoch(10, recipe(**options), 0, 0, 1)[0])
    with pytest.raises(NumericError, match="loss is not finite at step 0; first seen in the input 'image'"):
        run(tmp_path, poison=second[1][2], **options)
    report = json.loads((tmp_path / "crash" / "step_0_rank_0.json").read_text())
    assert report["sample_keys"] == [list(key) for key in second] != [list(key) for key in first]
    assert report["forward_seed"] == keyed_seed(42, 0, 1, 0)


class _Burst(nn.Module):
    def forward(self, x):
        return torch.where(x == x.max(), torch.inf, x)


def test_t6_the_first_module_that_is_not_finite_is_named(tmp_path):
    model = TinyNet()
    model.norm = nn.Sequential(nn.Identity(), _Burst())
    with pytest.raises(NumericError, match=r"first seen in the output of module 'norm\.1' \(_Burst\)"):
        run(tmp_path, model=model)


def test_t6_the_search_runs_fused_blocks_as_they_ran(tmp_path):
    """A block that a hook has call its layers may stay finite where it was not before."""

    class Fused(nn.Sequential):
        def forward(self, x):
            return self[0](x) if has_hooks(self[0]) else x + torch.inf

    model = TinyNet()
    model.norm = Fused(nn.Identity())
    with pytest.raises(NumericError, match=r"first seen in the output of module 'norm' \(Fused\)"):
        run(tmp_path, model=model)


def test_t6_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    model = TinyNet()

    def root_of_zero(model, batch):
        return model(batch["image"]) + (model.head.bias[0] * 0).abs().sqrt()

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NumericError, match=r"at step 0; first seen in the gradient of 'head.bias'"):
        run(tmp_path, model=model, forward=root_of_zero)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class _Overflow(torch.autograd.Function):
    """The identity, whose gradient overflows a bounded number of times."""

    left = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        _Overflow.left -= 1
        return gradient * (torch.inf if _Overflow.left >= 0 else 1)


@pytest.mark.parametrize(("overflows", "fails"), [(3, False), (20, False), (21, True)])
def test_t7_fp16_skips_are_counted_and_bounded(tmp_path, overflows, fails):
    _Overflow.left = overflows
    options = {
        "precision": "fp16",
        "epochs": 10,
        "forward": lambda m, batch: _Overflow.apply(m(batch["image"]).float()),
    }
    if fails:
        with pytest.raises(NumericError, match="gradient is not finite at step 20"):
            run(tmp_path, **options)
    else:
        run(tmp_path, **options)
        state = json.loads((tmp_path / "last" / "training_state.json").read_text())["position"]["loss_scaling"]
        assert state["scale"] == 65536 / 2**overflows
        assert state["skipped_in_a_row"] == 0


def test_t7_skips_in_a_row_are_counted_on_when_a_run_goes_on(tmp_path):
    _Overflow.left = 21
    stop, options = StopAt(8), {"precision": "fp16", "epochs": 10}
    with pytest.raises(Interrupted):
        run(tmp_path, **options, forward=lambda m, batch: _Overflow.apply(stop(m, batch).float()))
    with pytest.raises(NumericError, match="gradient is not finite at step 20"):
        run(tmp_path, **options, resume=True, forward=lambda m, batch: _Overflow.apply(m(batch["image"]).float()))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_is_of_the_forward_pass_alone(tmp_path, precision):
    seen = []

    def forward(model, batch):
        outputs = model(batch["image"])
        seen.append(outputs.dtype)
        return outputs

    model = TinyNet()
    run(tmp_path / "whole", model=model, precision=precision, forward=forward)
    assert set(seen) == {{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", precision=precision, forward=StopAt(4))
    run(tmp_path / "cut", precision=precision, resume=True)
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")
