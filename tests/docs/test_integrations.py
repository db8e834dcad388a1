"""The examples of docs/integrations.md run against the packages that they are for.

timm and nnU-Net are in no extra, since they need a torchvision of their own: their examples run against a stand-in as
well, and against the package where it can be imported.
"""

from __future__ import annotations

import importlib
import re
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import nnunet_style
import pytest
import torch
from hugging_face import small_model
from timm_style import TimmStyleStages
from torch.nn.utils import prune

from trifuse.blocks import backbone_features
from trifuse.kernels import ShapeError, dice_ce_loss, mutation_loss
from trifuse.kernels.ops.dice_ce_loss import dice_ce_loss_reference
from trifuse.kernels.ops.dilated_attention import dilated_attention_reference
from trifuse.kernels.testing import WrongResult

PAGE = (Path(__file__).resolve().parents[2] / "docs/integrations.md").read_text(encoding="utf-8")
FILES: dict[str, str] = dict(  # a paragraph that begins with the name of a file, then the file
    re.findall(r"^`(\w+\.py)`(?:(?!\n\n).)*\n\n```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
)


def example(name: str) -> SimpleNamespace:
    """Run a file of the page, and return what it defines."""
    defined: dict[str, object] = {"__name__": name.removesuffix(".py")}
    exec(compile(FILES[name], name, "exec"), defined)
    return SimpleNamespace(**defined)


def imported(name: str):
    """Return a package that may not work here, or skip the test with the reason."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch raises RuntimeError
        pytest.skip(f"{name} cannot be imported: {error}")


def assert_every_gradient(module: torch.nn.Module, *, but: tuple[str, ...] = ()) -> None:
    """Each parameter was reached by a gradient that is finite and not zero."""
    for name, parameter in module.named_parameters():
        if not name.startswith(but):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def test_every_example_is_tested_and_short():
    tested = Path(__file__).read_text(encoding="utf-8")
    assert len(FILES) == 6
    assert [name for name in FILES if f'example("{name}")' not in tested] == []
    assert {name: lines for name, code in FILES.items() if (lines := len(code.splitlines())) > 60} == {}


# ------------------------------------------------------------------------------------------------------------- MONAI


@pytest.fixture
def ecg_unet():
    pytest.importorskip("monai")
    torch.manual_seed(0)
    return example("ecg_unet.py").EcgUNet(num_classes=3, ecg_dim=8, features=(4, 4, 8, 8, 16, 4))


def test_monai_unet_without_an_ecg_is_monai_s_own(ecg_unet):
    from monai.networks.nets import BasicUNet

    plain = BasicUNet(spatial_dims=2, in_channels=1, out_channels=3, features=(4, 4, 8, 8, 16, 4))
    own = {name: value for name, value in ecg_unet.state_dict().items() if not name.startswith("fusion.")}
    plain.load_state_dict(own)
    image, code = torch.randn(2, 1, 32, 48), torch.randn(2, 8)
    code[1] = torch.nan
    logits, weights = ecg_unet(image, code, torch.tensor([3.0, torch.nan]), torch.tensor([True, False]))
    expected = plain(image)
    assert logits.shape == (2, 3, 32, 48)
    torch.testing.assert_close(logits[1], expected[1], rtol=0, atol=0)
    assert not torch.allclose(logits[0], expected[0], atol=1e-3)
    assert weights.tolist() == [[0.5, 0.5], [0.0, 0.0]]


def test_monai_unet_trains_every_parameter(ecg_unet):
    optimizer = torch.optim.Adam(ecg_unet.parameters(), lr=1e-2)
    image, target = torch.randn(2, 1, 32, 32), torch.randint(3, (2, 32, 32))
    losses = []
    for _ in range(3):  # the last layers of gate and film start as zero, and let nothing through at first
        optimizer.zero_grad()
        loss = dice_ce_loss(ecg_unet(image, torch.ones(2, 8).cumsum(1), torch.tensor([1, 60]))[0], target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_every_gradient(ecg_unet)
    assert losses[-1] < losses[0]


def test_monai_unet_refuses_a_code_of_another_width(ecg_unet):
    with pytest.raises(ShapeError, match=r"ecg_code"):
        ecg_unet(torch.randn(2, 1, 32, 32), torch.randn(2, 9), torch.tensor([1, 60]))


# ------------------------------------------------------------------------------------------------------ Hugging Face


@pytest.mark.parametrize("name", ["vit", "registers"])
def test_hidden_states_are_weighed_and_the_backbone_stays_as_it_is(name):
    backbone, _ = small_model(name)
    network = example("hidden_states.py").HiddenStateSegmenter(backbone, num_classes=3).train()
    with torch.no_grad():
        network.fusion.logits.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    image = torch.randn(2, 3, 32, 32)
    logits = network(image)
    maps = backbone_features(backbone, image)
    plain = (torch.stack(maps) * network.fusion.logits.softmax(0)[:, None, None, None, None]).sum(0)
    torch.testing.assert_close(logits, network.head(plain))

    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    dice_ce_loss(logits, torch.randint(3, (2, 32, 32))).backward()
    optimizer.step()
    assert_every_gradient(network, but=("backbone.",))
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert not backbone.training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_hidden_states_of_several_widths_are_refused():
    transformers = pytest.importorskip("transformers")
    sides = {"image_size": 32, "patch_size": 4, "window_size": 2}
    config = transformers.SwinConfig(embed_dim=8, depths=[1] * 3, num_heads=[1] * 3, **sides)
    network = example("hidden_states.py").HiddenStateSegmenter(transformers.SwinModel(config), num_classes=3)
    with pytest.raises(ShapeError, match="weighted_block_fusion"):
        network(torch.randn(1, 3, 32, 32))


# -------------------------------------------------------------------------------------------------------------- timm


@pytest.fixture(params=["timm", "a stand-in"])
def metaformer(request):
    torch.manual_seed(0)
    if request.param == "timm":
        imported("timm")
        return imported("timm.models.metaformer").MetaFormer(depths=(1, 2), dims=(16, 32), num_classes=2)
    return TimmStyleStages(dims=(16, 32), depths=(1, 2))


def test_dilated_attention_mixes_in_a_stage(metaformer):
    """Blocks have mixers of their own, each of which is the operator's definition on maps with channels last."""
    untouched = metaformer.stages[0].state_dict().keys()
    model = example("dilated_stage.py").with_dilated_attention(metaformer, 1)
    mixers = [block.token_mixer for block in model.stages[1].blocks]
    seen = []
    for mixer in mixers:
        mixer.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output)))
    image = torch.randn(2, 3, 34, 58)
    model(image).square().mean().backward()
    assert model.stages[0].state_dict().keys() == untouched
    assert len({*map(id, mixers)}) == len(seen) == 2
    for mixer, (x, mixed) in zip(mixers, seen, strict=True):
        q, k, v = mixer.attention.qkv(x).movedim(1, -1).chunk(3, dim=-1)
        expected = mixer.attention.proj(dilated_attention_reference(q, k, v, num_heads=2, dilations=(1, 2)))
        torch.testing.assert_close(mixed, expected.movedim(-1, 1))
    assert_every_gradient(torch.nn.ModuleList(mixers))


def test_pruning_and_hooks_act_on_a_mixer(metaformer):
    model = example("dilated_stage.py").with_dilated_attention(metaformer, 1)
    attention = model.stages[1].blocks[0].token_mixer.attention
    prune.l1_unstructured(attention.qkv, "weight", amount=0.5)
    called = []
    attention.proj.register_forward_hook(lambda *_: called.append("proj"))
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert called == ["proj"]
    gradient, mask = attention.qkv.weight_orig.grad, attention.qkv.weight_mask
    assert gradient[mask == 1].any()
    assert not gradient[mask == 0].any()


def test_a_mixer_is_made_as_timm_makes_one_and_refuses_heads_that_do_not_fit():
    mixer = example("dilated_stage.py").DilatedMixer
    made = mixer(dim=32, proj_drop=0.5, device=None, dtype=torch.float64)
    assert made(torch.randn(1, 32, 5, 7, dtype=torch.float64)).shape == (1, 32, 5, 7)
    assert made.drop.p == 0.5
    with pytest.raises(ShapeError, match="DilatedAttention"):
        mixer(dim=48)  # three heads for two dilations
    with pytest.raises(ShapeError, match=r"expected a map \(B, H, W, 32\)"):
        made(torch.randn(1, 16, 5, 7, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------- nnU-Net


@pytest.fixture(params=["nnunetv2", "a stand-in"])
def nnunet(request, monkeypatch):
    """The trainers of the page, on nnU-Net's own or on a stand-in's."""
    if request.param == "nnunetv2":
        imported("nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
    else:
        nnunet_style.install(monkeypatch)
    return example("fused_trainers.py")


def trainer(kind, *, axes=2, batch_dice=True, ignore_label=None, regions=False, ddp=False, deep=True, outputs=4):
    """Return a trainer as far as its loss asks for it: without plans, data and a network."""
    made = object.__new__(kind)
    made.device, made.is_ddp, made.enable_deep_supervision = torch.device("cpu"), ddp, deep
    made.label_manager = SimpleNamespace(has_regions=regions, ignore_label=ignore_label)
    strides = [[1] * axes, *([2] * axes for _ in range(outputs))]
    made.configuration_manager = SimpleNamespace(
        batch_dice=batch_dice, patch_size=(16,) * axes, pool_op_kernel_sizes=strides
    )
    return made


def drawn_outputs(axes, count=4, classes=3, ignore=False):
    """Return logits at several sizes, finest first, and labels as nnU-Net's loaders make them."""
    generator = torch.Generator().manual_seed(0)
    sides = [16 >> i for i in range(count)]
    logits = [torch.randn(2, classes, *[side] * axes, generator=generator, requires_grad=True) for side in sides]
    labels = [torch.randint(classes + ignore, (2, 1, *[side] * axes), generator=generator).short() for side in sides]
    return logits, labels


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("ignore_label", [None, 3])
@pytest.mark.parametrize("deep", [True, False])
def test_the_fused_loss_is_nnu_net_s_in_value_and_gradient(nnunet, axes, batch_dice, ignore_label, deep):
    kind = nnunet.nnUNetTrainerFusedDiceCE
    options = {"axes": axes, "batch_dice": batch_dice, "ignore_label": ignore_label, "deep": deep}
    own, fused = (trainer(each, **options)._build_loss() for each in (kind.__bases__[0], kind))
    logits, labels = drawn_outputs(axes, ignore=ignore_label is not None)
    logits, labels = (logits, labels) if deep else (logits[:1], labels[:1])
    results = []
    for loss in (own, fused):
        value = loss(logits, labels) if deep else loss(logits[0], labels[0])
        used = logits[:-1] if deep else logits  # the coarsest output weighs nothing
        results.append([value, *torch.autograd.grad(value, used)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)
    assert [type(module).__name__ for module in fused.modules()].count("FusedDiceCE") == 1


@pytest.mark.parametrize("options", [{"regions": True}, {"ddp": True, "batch_dice": True}], ids=["regions", "ranks"])
def test_what_the_fused_loss_cannot_be_stays_nnu_net_s(nnunet, options):
    kind = nnunet.nnUNetTrainerFusedDiceCE
    own, kept = (trainer(each, **options)._build_loss() for each in (kind.__bases__[0], kind))
    assert [type(module) for module in kept.modules()] == [type(module) for module in own.modules()]


@pytest.mark.parametrize("ignore_label", [None, 3])
def test_the_mutation_trainer_means_the_losses_of_every_sum_of_the_finest_outputs(nnunet, ignore_label):
    loss = trainer(nnunet.nnUNetTrainerMutation, ignore_label=ignore_label)._build_loss()
    logits, labels = drawn_outputs(2, ignore=ignore_label is not None)
    target = labels[0][:, 0].long()
    full = [torch.nn.functional.interpolate(x, (16, 16), mode="bilinear") for x in logits[:3]]
    sums = [sum(chosen) for size in (1, 2, 3) for chosen in combinations(full, size)]
    options = {"flavour": "transunet", "w_ce": 0.6, "w_dice": 0.4, "ignore_index": ignore_label}
    expected = torch.stack([dice_ce_loss_reference(x, target, **options) for x in sums]).mean()
    value = loss(logits, labels)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, logits[:3]), torch.autograd.grad(expected, logits[:3]))


@pytest.mark.parametrize(("options", "got"), [({"axes": 3}, "3 axes"), ({"regions": True}, "regions")])
def test_the_mutation_trainer_refuses_before_training(nnunet, options, got):
    with pytest.raises(ValueError, match=f"expected a 2d configuration without regions, got {got}"):
        trainer(nnunet.nnUNetTrainerMutation, **options)._build_loss()


def test_the_losses_are_compared_by_value_gradient_time_and_memory(nnunet, monkeypatch):
    monkeypatch.setitem(sys.modules, "fused_trainers", nnunet)
    compare = example("compare_losses.py").compare_losses
    rows = compare((1, 2, 4, 6, 8), False, seconds=0.01).rows
    assert [(row["pass"], row["provider"]) for row in rows] == [
        (timed, provider) for timed in ("forward", "forward + backward") for provider in ("nnU-Net", "trifuse")
    ]
    monkeypatch.setattr(nnunet.FusedDiceCE, "forward", lambda self, logits, labels: logits.sum())
    with pytest.raises(WrongResult, match="trifuse"):
        compare((2, 3, 8, 8), True, seconds=0.01)


def test_nnu_net_finds_the_trainers_in_an_external_folder(tmp_path, monkeypatch):
    find = imported("nnunetv2.utilities.find_objects").recursive_find_trainer_class_by_name
    imported("timm")  # some of nnU-Net's own trainers need it, and it imports them all on its search
    (tmp_path / "fused_trainers.py").write_text(FILES["fused_trainers.py"], encoding="utf-8")
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    assert find("nnUNetTrainerMutation").__name__ == "nnUNetTrainerMutation"


# --------------------------------------------------------------------------------------------------------- Lightning


def small_fias(module):
    from trifuse.architectures.fias.variants import DilateFormerShape

    shape = DilateFormerShape(embed_dim=6, depths=(1, 1, 1, 1), num_heads=(3, 3, 3, 3))
    return module.LitFias(module.FiasConfig(variant=shape, decoder_heads=(2, 2, 2, 2), num_classes=3), lr=1e-3)


@pytest.fixture
def lightning():
    pytest.importorskip("lightning.pytorch", reason="needs the extra: pip install 'trifuse[lightning]'")
    return example("lit_fias.py")


def fitted_by(lightning, batches, folder, **options):
    """Return the module after an epoch of Lightning's loop, and the trainer."""
    module = small_fias(lightning)
    quiet = dict.fromkeys(("enable_checkpointing", "enable_model_summary", "enable_progress_bar", "logger"), False)
    trainer = lightning.pl.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=folder, **quiet, **options)
    torch.manual_seed(0)
    trainer.fit(module, batches)
    return module, trainer


def drawn_batches(count):
    """Return a loader of images and targets that takes no number from the global generator, as the loops do not."""
    drawn = [(torch.randn(2, 1, 32, 32), torch.randint(3, (2, 32, 32))) for _ in range(count)]
    return torch.utils.data.DataLoader(drawn, batch_size=None, generator=torch.Generator())


def test_lightning_trains_as_a_loop_of_one_s_own_does(lightning, tmp_path):
    batches = drawn_batches(3)
    module, trainer = fitted_by(lightning, batches, tmp_path)
    plain = small_fias(lightning).network.train()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3, weight_decay=1e-4)
    torch.manual_seed(0)
    for image, target in batches:
        optimizer.zero_grad()
        loss = mutation_loss(plain(image), target)
        loss.backward()
        optimizer.step()
    assert trainer.callback_metrics["train_loss"] == loss
    for (name, trained), expected in zip(module.network.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(trained, expected), name

    (scores,) = trainer.validate(module, batches, verbose=False)
    assert 0 < scores["val_soft_dice"] < 1
    module.network.save_pretrained(tmp_path / "fias")
    loaded = lightning.Fias.from_pretrained(tmp_path / "fias").eval()
    assert torch.equal(loaded(image), module.network.eval()(image))


def test_lightning_s_mixed_precision_leaves_the_loss_in_float32(lightning, tmp_path):
    batches = drawn_batches(1)
    (_, wide), (_, mixed) = (
        fitted_by(lightning, batches, tmp_path, precision=name) for name in ("32-true", "bf16-mixed")
    )
    losses = [trainer.callback_metrics["train_loss"] for trainer in (wide, mixed)]
    assert [loss.dtype for loss in losses] == [torch.float32] * 2
    assert losses[1] != losses[0]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0)
