"""The score that chooses the best epoch: the volume's Dice, from slices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.phantoms.left_atrium import write_left_atrium_phantom
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.data.samples.slice_dataset import SliceDataset
from trifuse.architectures.evaluation.metrics import case_metrics
from trifuse.architectures.training.validation import SliceValidation


class Slices(torch.utils.data.Dataset):
    """Slices of several cases whose image is what the network is going to answer."""

    def __init__(self, answers, targets, cases):
        self.answers, self.targets, self.cases = answers, targets, cases

    def __len__(self):
        return len(self.cases)

    def __getitem__(self, index):
        return {"image": self.answers[index], "target": self.targets[index], "case_id": self.cases[index]}


class Answer(nn.Module):
    """Return logits whose argmax is the image."""

    def __init__(self, classes):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))
        self.classes = classes

    def forward(self, image):
        return nn.functional.one_hot(image, self.classes).movedim(-1, 1) * self.one


def random_slices(classes, cases):
    answers, targets = torch.from_numpy(np.random.default_rng(0).integers(0, classes, (2, len(cases), 6, 5)))
    return Slices(answers, targets, cases)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize("classes", [2, 3])
def test_dice_is_that_of_the_volumes_however_slices_are_batched(classes, batch_size):
    slices = random_slices(classes, ["a", "a", "b", "a", "b"])
    names = ("background", "one", "two")[:classes]
    scores = SliceValidation(slices, names, batch_size)(Answer(classes))
    want = []
    for case in "ab":
        of_case = [i for i, name in enumerate(slices.cases) if name == case]
        p, t = slices.answers[of_case].numpy(), slices.targets[of_case].numpy()
        want.append([case_metrics(p == k, t == k, (1, 1, 1))["dsc"] for k in range(1, classes)])
    assert scores["dice"] == pytest.approx(np.mean(want))
    if classes == 2:
        assert set(scores) == {"dice"}
    else:
        assert [scores["dice_one"], scores["dice_two"]] == pytest.approx(np.mean(want, axis=0))


def test_a_class_that_is_nowhere_does_not_count():
    slices = Slices(torch.zeros(2, 4, 4, dtype=torch.long), torch.zeros(2, 4, 4, dtype=torch.long), ["a", "b"])
    slices.answers[1, 0, 0] = slices.targets[1, 0, 0] = 1
    assert SliceValidation(slices, ("background", "one"), 2)(Answer(2))["dice"] == 1
    slices.targets[0, 0, 0] = 1  # missed: now case a counts, as 0
    assert SliceValidation(slices, ("background", "one"), 2)(Answer(2))["dice"] == 0.5
    empty = Slices(torch.zeros(1, 4, 4, dtype=torch.long), torch.zeros(1, 4, 4, dtype=torch.long), ["a"])
    assert math.isnan(SliceValidation(empty, ("background", "one"), 1)(Answer(2))["dice"])


def test_pixels_whose_target_is_negative_do_not_count():
    slices = random_slices(3, ["a", "b", "b"])
    whole = SliceValidation(slices, ("background", "one", "two"), 2)(Answer(3))
    twice = Slices(*(torch.cat([part, part]) for part in (slices.answers, slices.targets)), slices.cases * 2)
    twice.targets[:3, :4], twice.targets[3:, 4:] = -1, -1  # each pixel is shown twice, and counts once
    assert SliceValidation(twice, ("background", "one", "two"), 2)(Answer(3)) == pytest.approx(whole)


def test_one_logit_is_a_sigmoid():
    slices = random_slices(2, ["a", "b", "b"])
    two = SliceValidation(slices, ("background", "one"), 2)(Answer(2))
    forward = lambda model, batch: (batch["image"][:, None] - 0.5) * model.one  # noqa: E731
    assert SliceValidation(slices, ("background", "one"), 2, forward)(Answer(2)) == two


def test_on_a_real_data_set(tmp_path):
    write_left_atrium_phantom(tmp_path, cases=3, size=(24, 24, 4))
    cohort = open_cohort(tmp_path)
    slices = SliceDataset(cohort, ["train_1", "train_2"], Preprocessing(image_size=28))

    def oracle(model, batch):
        return nn.functional.one_hot(batch["target"], 2).movedim(-1, 1).float()

    assert SliceValidation(slices, cohort.class_names, 3, oracle)(Answer(2)) == {"dice": 1.0}
    assert SliceValidation(slices, cohort.class_names, 3, lambda *_: -oracle(*_))(Answer(2))["dice"] == 0
