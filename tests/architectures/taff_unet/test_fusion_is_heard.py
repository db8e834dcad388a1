"""The ECG is heard: it moves the logits, by more than the border's padding, its parts learn, and gates differ.

Every network here fuses at 32 x 32 positions, and pads by repeating its border, so that nothing of the ECG comes in
from there: on the 8 x 8 maps of smaller networks every second position knows of the padding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trifuse.architectures.taff_unet import EcgAutoencoderConfig, TaffUNet, taff_unet
from trifuse.architectures.taff_unet.config import TaffUNetConfig
from trifuse.architectures.training.losses import SegmentationLoss
from trifuse.blocks.segment_masks import pooled_masks, segment_labels

SIDE, SAMPLES = 64, 8
BEAT = EcgAutoencoderConfig(time_steps=64, z_dim=16, base_dim=2, downsample=2, dropout=0.0)
FIRST_FORM = {"projection": "broadcast", "gate": "after_norm", "gate_time": "unseen"}
HEARD = [
    ("full", {}),
    ("full", {"segment_masks": "soft"}),
    ("full", {"projection": "segments_full"}),
    ("full", {"projection": "grid"}),
    ("full", {"projection": "broadcast", "rectify": True}),
    ("ecg", {}),  # broadcast and rectified
    ("ecg", {"projection": "grid", "grid_side": 4}),
]


def network(setting: str = "full", **options: Any) -> TaffUNet:
    """Return a small network in float64 whose every convolution repeats its border."""
    model = taff_unet(setting, image_size=SIDE, base_dim=4, fusion_stage=1, ecg=BEAT, **options).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "replicate"
    return model.eval()


def taught(model: TaffUNet) -> TaffUNet:
    """Let the last layer of the gate be what it could be after some training."""
    gate = getattr(model.fusion.gate, "others", model.fusion.gate)  # but for what it makes of the days
    torch.nn.init.normal_(gate.second.weight, std=0.3, generator=torch.Generator().manual_seed(5))
    return model


def ring() -> Tensor:
    """A wall of six segments about the middle, (64, 64)."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, SIDE)] * 2, indexing="ij")
    radius, sector = torch.hypot(x, y), ((torch.atan2(y, x) / torch.pi + 1) * 3).long().clamp(0, 5)
    return torch.where((radius > 0.3) & (radius < 0.6), sector + 1, 0)


def cases(setting: str = "full") -> dict[str, Tensor]:
    """Images of different contrast and texture, one wall, and an ECG each."""
    generator = torch.Generator().manual_seed(1)
    drawn = {"generator": generator, "dtype": torch.float64}
    image = torch.randn(SAMPLES, 1, SIDE, SIDE, **drawn).cumsum(-1) * torch.rand(SAMPLES, 1, 1, 1, **drawn)
    one_hot = torch.nn.functional.one_hot(ring(), 18)[..., 1:].permute(2, 0, 1)
    given = {
        "image": image,
        "ecg": torch.randn(SAMPLES, 12, BEAT.time_steps, **drawn),
        "interval": torch.linspace(0, 80, SAMPLES, dtype=torch.float64),
        "transform": torch.eye(2, 3, dtype=torch.float64).expand(SAMPLES, 2, 3),
    }
    return {**given, "prior": one_hot.expand(SAMPLES, -1, -1, -1).to(torch.uint8)} if setting == "full" else given


def change_by_another_ecg(model: TaffUNet, given: dict[str, Tensor]) -> float:
    """The largest change of a logit, in SDs of the logits, when every case gets the ECG of another one."""
    with torch.inference_mode():
        before, after = (model(**{**given, "ecg": ecg}) for ecg in (given["ecg"], given["ecg"].flip(0)))
    return ((before - after).abs().max() / before.std()).item()


@pytest.mark.parametrize(("setting", "options"), HEARD, ids=str)
def test_another_ecg_moves_the_logits(setting, options):
    assert change_by_another_ecg(network(setting, **options), cases(setting)) > 0.05


def test_the_first_form_is_deaf():
    """One value for every position of a channel is gone behind the next norm, but for what the border lets in."""
    model = network(**FIRST_FORM)
    assert change_by_another_ecg(model, cases()) < 1e-6
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "zeros"
    assert change_by_another_ecg(model, cases()) > 1e-3


def test_an_ecg_without_a_wall_is_its_shared_part_alone():
    """It is not refused; which segment its scores would lie in does not matter."""
    model, given = network(), cases()
    given["prior"] = torch.zeros_like(given["prior"])
    before = model(**given)
    assert before.isfinite().all()
    torch.nn.init.normal_(model.fusion.direction, std=9.0)
    assert torch.equal(model(**given), before)
    model.fusion.projection.bias.data.add_(1.0)
    seen: list[Tensor] = []
    model.fusion.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    model(**given)
    model.fusion.projection.bias.data.sub_(1.0)
    model(**given)
    torch.testing.assert_close(seen[0] - seen[1], torch.full_like(seen[0], 0.5))


def test_every_part_of_the_ecgs_way_learns_from_the_segmentation():
    """At the first step already: a and v, the last layers of gate and film, and the encoder of the ECG."""
    model, given = network().train(), cases()
    target = torch.randint(4, (SAMPLES, SIDE, SIDE), generator=torch.Generator().manual_seed(2))
    SegmentationLoss()(model(**given), {"target": target}, None).backward()
    fusion, largest = model.fusion, lambda parameter: parameter.grad.abs().max()
    last = [part.second.weight for part in (fusion.gate.others, fusion.gate.time, fusion.film.mlp)]
    for parameter in (fusion.scores.weight, fusion.direction, *last):
        assert largest(parameter) > 1e-6
    assert any(largest(parameter) > 1e-9 for parameter in model.ecg.encoder.parameters())
    model = taught(network()).train()
    SegmentationLoss()(model(**given), {"target": target}, None).backward()
    assert largest(model.fusion.gate.others.first.weight) > 1e-7


@pytest.mark.parametrize("seed", range(3))
def test_gate_weights_differ_between_cases(seed):
    """For the image alone as well, with one and the same ECG in all cases."""
    model, given = taught(network(init_seed=seed)), cases()
    with torch.inference_mode():
        assert model.run(**given).gate[:, 1].std() > 1e-3
        given["ecg"] = given["ecg"][:1].expand_as(given["ecg"])
        of_the_image = model.run(**given).gate[:, 1].std()
    assert of_the_image > 1e-3


@pytest.mark.parametrize("projection", ["segments", "segments_full", "grid", "broadcast"])
def test_segment_scores_come_with_the_outputs(projection):
    model, given = network(projection=projection), cases()
    has_ecg = torch.arange(SAMPLES) != 2
    with torch.inference_mode():
        scores = model.run(**given, has_ecg=has_ecg).segment_scores
        assert model.run(given["image"], given["prior"]).segment_scores is None
        if projection != "segments":
            assert scores is None
            return
        assert tuple(scores.shape) == (SAMPLES, 17)
        assert not scores[2].any()
        code = model.ecg.encode(given["ecg"])
        torch.testing.assert_close(scores[has_ecg], model.fusion.segment_scores(code)[has_ecg])
    assert network("ap").run(given["image"], given["prior"]).segment_scores is None


@pytest.mark.parametrize("masks", ["labels", "soft"])
def test_the_fusion_is_given_the_prior_at_the_size_of_its_map(masks):
    model, given = network(segment_masks=masks), cases()
    seen: list[Tensor] = []
    model.fusion.register_forward_pre_hook(lambda module, args: seen.append(args[4]))
    model(**given)
    small = (segment_labels if masks == "labels" else pooled_masks)(given["prior"], (32, 32))
    assert torch.equal(seen[0], small.to(seen[0].dtype))
    assert seen[0].unique().numel() == (7 if masks == "labels" else 5)


def test_the_gate_sees_the_image_from_before_its_norm():
    """After the norm, a brighter image is the same image."""
    model, given = network(), cases()
    seen: list[Tensor] = []
    model.fusion.gate.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    last = model.encoder.stages[1][0].convs[-1].conv
    convolved: list[Tensor] = []
    last.register_forward_hook(lambda module, args, output: convolved.append(output))
    model(**given)
    torch.testing.assert_close(seen[0][:, :8], convolved[0].mean((2, 3)))
    torch.testing.assert_close(seen[0][:, 8:-1].mean(1), torch.zeros(SAMPLES, dtype=torch.float64), atol=1e-6, rtol=0)
    last.bias.data.add_(1.0)
    model(**given)
    torch.testing.assert_close(seen[1][:, :8], seen[0][:, :8] + 1)
    old = network(**FIRST_FORM)
    old.fusion.gate.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    old.fusion.register_forward_pre_hook(lambda module, args: seen.append(args[0].mean((2, 3))))
    old(**given)
    torch.testing.assert_close(seen[3][:, :8], seen[2])


def test_defaults_follow_the_prior():
    for setting, projection, rectifies in (("full", "segments", False), ("ecg", "broadcast", True)):
        config = TaffUNetConfig(setting)
        assert (config.projection, config.rectify) == (None, None)
        assert (config.fusion_projection, config.rectifies) == (projection, rectifies)
        fusion = network(setting).fusion
        assert (fusion.form, fusion.rectify, fusion.normalise_code) == (projection, rectifies, True)
    assert not TaffUNetConfig("ecg", projection="broadcast").rectifies  # today's form, unless it is asked for
    assert TaffUNetConfig("full", rectify=True).rectifies
    old = network(**FIRST_FORM).fusion
    assert (old.form, old.rectify, old.normalise_code, old.gate.slope) == ("broadcast", False, False, 0.0)
