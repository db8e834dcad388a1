"""One rank's losses are one operator from the logits to the loss; those of several ranks stop to add up their sums."""

from __future__ import annotations

import json

import pytest
from children import run_ranks
from tiny_run import assert_same_run, run

from trifuse.architectures.training.losses import MutationLoss, SegmentationLoss
from trifuse.kernels import backend
from trifuse.kernels.testing import launches

FINISH = "_dice_ce_kernel"  # makes the loss, and its slopes, of the sums


def counted_run(out, **options):
    """Train on Triton kernels, and write down how often each was launched."""
    with backend("triton"), launches() as counted:
        run(out, epochs=1, length=6, **options)
    (out.parent / f"{out.name}.json").write_text(json.dumps(counted.kernels))


@pytest.mark.parametrize("loss", [SegmentationLoss(), SegmentationLoss(batch_dice=False), MutationLoss()])
def test_one_rank_fuses_its_loss_and_two_do_not(tmp_path, loss):
    counted_run(tmp_path / "one", loss=loss)
    assert run_ranks(lambda: counted_run(tmp_path / "two", loss=loss)) == [0, 0]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one[FINISH] == 2  # one for each step
    assert two
    assert FINISH not in two
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_loss_of_the_users_own_may_call_reduce(tmp_path):
    """Also where there is one rank, and nothing to add up."""
    own, library = [], SegmentationLoss()

    def loss(outputs, batch, reduce):
        own.append(reduce(batch["sample_weight"].sum()))
        return library(outputs, batch, lambda sums: reduce(sums))

    run(tmp_path / "own", loss=loss, epochs=1, length=6)
    run(tmp_path / "library", loss=library, epochs=1, length=6)
    assert [float(samples) for samples in own] == [4, 2]
    assert_same_run(tmp_path / "own", tmp_path / "library", atol=0)
