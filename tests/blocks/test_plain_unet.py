"""The parts of nnU-Net's plain U-Net: definition, plan, numbers of the published implementation, refusals."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from golden_numbers import Fixture, fixture_names, load_fixture
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.blocks import PlainUNetDecoder, PlainUNetEncoder
from trifuse.blocks.plain_unet import check_sides, planned_features, planned_stages
from trifuse.kernels import ShapeError, TrifuseError

SMALL = ("small_4stage_ds", "small_3stage_nods")
DTYPES = (torch.float64, torch.float32)
TOPOLOGIES = load_fixture("nnunet/topology_2d").facts["topologies"]
FEATURES = (3, 5, 4)


def image(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parts(in_channels: int = 2, features: tuple[int, ...] = FEATURES, classes: int = 3) -> nn.ModuleDict:
    """An encoder and a decoder with numbers in every parameter."""
    module = nn.ModuleDict(
        {"encoder": PlainUNetEncoder(in_channels, features), "decoder": PlainUNetDecoder(features, classes)}
    ).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


# ------------------------------------------------------------------------------------------------------ definition


def unit(x: Tensor, weights: dict[str, Tensor], name: str, stride: int) -> Tensor:
    """Convolution, mean 0 and variance 1 of each sample's channel, scale and shift, leaky rectifier."""
    x = F.conv2d(x, weights[f"{name}.conv.weight"], weights[f"{name}.conv.bias"], stride=stride, padding=1)
    x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    x = x * weights[f"{name}.norm.weight"][:, None, None] + weights[f"{name}.norm.bias"][:, None, None]
    return torch.where(x > 0, x, 0.01 * x)


def definition(x: Tensor, weights: dict[str, Tensor], stages: int) -> tuple[list[Tensor], list[Tensor]]:
    """Maps finest first, and logits full resolution first."""
    maps = []
    for stage in range(stages):
        x = unit(x, weights, f"encoder.stages.{stage}.0.convs.0", 2 if stage else 1)
        x = unit(x, weights, f"encoder.stages.{stage}.0.convs.1", 1)
        maps.append(x)
    logits = []
    for stage in range(stages - 1):
        name = f"decoder.transpconvs.{stage}"
        up = F.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2)
        x = torch.cat([up, maps[-2 - stage]], dim=1)
        for conv in range(2):
            x = unit(x, weights, f"decoder.stages.{stage}.convs.{conv}", 1)
        name = f"decoder.seg_layers.{stage}"
        logits.append(F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"]))
    return maps, logits[::-1]


@pytest.mark.parametrize(("height", "width"), [(8, 12), (4, 8)])
def test_matches_definition(height, width):
    module = parts()
    x = image(2, 2, height, width)
    maps = module["encoder"](x)
    logits = module["decoder"](maps)
    expected = definition(x, module.state_dict(), 3)
    for results, wanted in zip((maps, logits), expected, strict=True):
        assert len(results) == len(wanted)
        for result, tensor in zip(results, wanted, strict=True):
            torch.testing.assert_close(result, tensor)


def test_the_last_head_alone_is_the_first_of_all():
    module = parts()
    maps = module["encoder"](image(1, 2, 8, 8))
    alone = module["decoder"](maps, all_heads=False)
    assert len(alone) == 1
    assert torch.equal(alone[0], module["decoder"](maps)[0])


def test_stages_run_one_by_one():
    encoder = parts()["encoder"]
    x = image(1, 2, 8, 8)
    maps = encoder(x)
    for stage, expected in zip(encoder.stages, maps, strict=True):
        x = stage(x)
        assert torch.equal(x, expected)


def test_maps_are_left_as_they_were():
    """What rectifies in place writes over no map that anybody holds."""
    module = parts()
    x = image(2, 2, 8, 8)
    maps = module["encoder"](x)
    before = [tensor.clone() for tensor in (x, *maps)]
    module["decoder"](maps)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip((x, *maps), before, strict=True))


def test_gradients():
    """Of the image and of every parameter, against finite differences; a bias before a norm has none."""
    module = parts(1, (2, 3), 2)
    x = image(1, 1, 4, 4).requires_grad_()
    names, values = zip(*module.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        maps = torch.func.functional_call(module["encoder"], _under("encoder.", names, values), x)
        return tuple(torch.func.functional_call(module["decoder"], _under("decoder.", names, values), (maps,)))

    assert torch.autograd.gradcheck(run, (x, *values))


def _under(prefix: str, names: tuple[str, ...], values: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): v for name, v in zip(names, values, strict=True) if name.startswith(prefix)}


# ------------------------------------------------------------------------------------------------------------ plan


@pytest.mark.parametrize("patch", TOPOLOGIES)
def test_plan_of_every_patch_size(patch):
    topology = TOPOLOGIES[patch]
    stages = planned_stages(min(int(side) for side in patch.split("x")))
    assert stages == topology["n_stages"]
    assert list(planned_features(stages)) == topology["features"]
    assert topology["strides"] == [[1, 1]] + [[2, 2]] * (stages - 1)
    assert {tuple(kernel) for kernel in topology["kernel_sizes"]} == {(3, 3)}
    padded = topology["patch_size_after_padding"]
    assert topology["must_be_divisible_by"] == [2 ** (stages - 1)] * 2
    check_sides("it", torch.empty(1, 1, *padded, device="meta"), stages)


@given(st.integers(1, 3000))
def test_halving_stops_before_the_coarsest_edge_falls_below_four(side):
    stages = planned_stages(side)
    edges = [math.ceil(side / 2**stage) for stage in range(stages)]
    assert all(edge >= 8 for edge in edges[:-1])
    assert edges[-1] < 8


def test_features_double_up_to_the_most():
    assert planned_features(4, base_dim=6, max_dim=20) == (6, 12, 20, 20)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ((250, 256), "7 stages need sides that are multiples of 64, got 250 x 256; pad or resize to 256 x 256"),
        ((256, 65), "got 256 x 65; pad or resize to 256 x 128"),
        ((0, 64), "got 0 x 64; pad or resize to 64 x 64"),
        ((64, 64), "7 stages leave a single pixel of 64 x 64, .*; use 128 x 128 or more"),
    ],
)
def test_sides_that_are_refused(sides, message):
    with pytest.raises(ShapeError, match=f"^it: .*{message}"):
        check_sides("it", torch.empty(1, 1, *sides, device="meta"), 7)
    check_sides("it", torch.empty(1, 1, 64, 128, device="meta"), 7)


# ----------------------------------------------------------------------------------------------- published numbers


def test_every_fixture_is_used():
    used = {*SMALL, "topology_2d", "keys_default_256x256", "filled_default_256x256"}  # the last two by the network
    assert set(fixture_names("nnunet")) == {f"nnunet/{name}" for name in used}


def published_results(module: nn.ModuleDict, x: Tensor, all_heads: bool) -> dict[str, Tensor]:
    """Everything that encoder and decoder compute, by its published name."""
    results: dict[str, Tensor] = {}
    for index, stage in enumerate(module["decoder"].stages):
        stage.register_forward_hook(lambda _, __, out, index=index: results.update({f"dec{index}": out}))
    maps = module["encoder"](x)
    logits = module["decoder"](maps, all_heads=all_heads)
    results |= {f"enc{index}": tensor for index, tensor in enumerate(maps)}
    return results | {f"out{index}": tensor for index, tensor in enumerate(logits)}


def stored_parameters(fixture: Fixture) -> dict[str, Tensor]:
    return {name.removeprefix("param."): fixture.tensors[name] for name in fixture.expected("param.")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SMALL)
def test_published_values_and_every_gradient(name, dtype):
    fixture = load_fixture(f"nnunet/{name}")
    made = fixture.facts["constructor"]
    module = parts(made["input_channels"], tuple(made["features_per_stage"]), made["num_classes"]).to(dtype)
    module.load_state_dict(stored_parameters(fixture))
    assert sum(parameter.numel() for parameter in module.parameters()) == fixture.facts["n_parameters"]
    x = fixture.tensors["input"].to(dtype).requires_grad_()
    results = published_results(module, x, all_heads=made["deep_supervision"])
    assert results.keys() == fixture.facts["tolerance_f32_vs_f64"].keys()
    for result, tensor in results.items():
        assert fixture.difference(result, tensor) < fixture.bound(result, dtype), result
    cotangents = fixture.expected("cotangent")
    heads = [results[cotangent.replace("cotangent", "out")] for cotangent in cotangents]
    torch.autograd.backward(heads, [fixture.tensors[cotangent].to(dtype) for cotangent in cotangents])
    worst = max(observed["rel_l2"] for observed in fixture.facts["tolerance_f32_vs_f64"].values())
    bound = 3e-7 if dtype == torch.float64 else 10 * worst
    assert fixture.difference("dinput", x.grad) < bound
    check_norms(dict(module.named_parameters()), fixture.facts, bound)


def check_norms(parameters: dict[str, nn.Parameter], facts: dict, bound: float) -> None:
    """Norms of all gradients; that of a bias that a norm swallows is zero but for rounding."""
    norms = facts["grad_norms"]
    assert {name for name, p in parameters.items() if p.grad is None} == set(facts["unused_parameters"])
    assert {name for name, p in parameters.items() if p.grad is not None} == set(norms)
    scale = max(norms.values())
    for name, norm in norms.items():
        got = float(parameters[name].grad.double().norm())
        assert abs(got - norm) < bound * (scale if name.endswith("conv.bias") else norm), name


# ------------------------------------------------------------------------------------------------ weights, refusals


def test_initialisation():
    """He's normal distribution over the fan-in with the rectifier's slope; what is no convolution starts as 1 and 0."""
    torch.manual_seed(0)  # the standard deviation of 288 numbers is 5 % off one time in four
    module = nn.ModuleDict({"encoder": PlainUNetEncoder(4, (32, 64)), "decoder": PlainUNetDecoder((32, 64), 100)})
    for name, parameter in module.state_dict().items():
        if parameter.ndim == 4:
            wanted = math.sqrt(2 / (1 + 0.01**2) / parameter[0].numel())
            assert float(parameter.std()) == pytest.approx(wanted, rel=0.05), name
            assert abs(float(parameter.mean())) < wanted / 10, name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, name.endswith("weight"))), name


def test_weights_come_from_the_generator():
    encoder, decoder = PlainUNetEncoder(1, (3, 4)), PlainUNetDecoder((3, 4), 2)
    for module in (encoder, decoder):
        states = []
        for seed in (0, 0, 1):
            module.reset_parameters(torch.Generator().manual_seed(seed))
            states.append(copy.deepcopy(module.state_dict()))
        drawn = [name for name, tensor in states[0].items() if tensor.ndim == 4]
        assert all(torch.equal(states[0][name], states[1][name]) for name in drawn)
        assert not any(torch.equal(states[0][name], states[2][name]) for name in drawn)


@pytest.mark.parametrize(
    "change",
    [
        lambda maps: maps[:2],
        lambda maps: maps[::-1],
        lambda maps: [],
        lambda maps: [maps[0][..., :4], *maps[1:]],
        lambda maps: [maps[0], maps[1][:1], maps[2]],
    ],
)
def test_b6_other_maps_are_listed(change):
    module = parts()
    maps = change(module["encoder"](image(2, 2, 8, 8)))
    with pytest.raises(ShapeError, match=r"expected maps of shapes \[\(\d.*\], finest first, got \["):
        module["decoder"](maps)


def test_one_map_is_no_u_net():
    with pytest.raises(ValueError, match=r"the channels of at least two maps, got \(8,\)"):
        PlainUNetDecoder((8,), 2)


def test_b7_a_single_pixel_cannot_be_normalised():
    encoder = parts()["encoder"]
    for training in (True, False):
        with pytest.raises(ShapeError, match=r"more than one value per channel and sample, got shape \(2, 4, 1, 1\)"):
            encoder.train(training)(image(2, 2, 4, 4))


def test_b14_copies_and_pickles():
    module = parts()
    x = image(1, 2, 8, 8)
    expected = module["decoder"](module["encoder"](x))[0]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other["decoder"](other["encoder"](x))[0], expected)


def test_a_stage_that_tells_no_means_is_refused_where_they_are_needed():
    encoder, x = PlainUNetEncoder(1, (2, 3)).double(), image(2, 1, 8, 8)
    encoder.stages[1] = nn.Conv2d(2, 3, 1).double()
    assert len(encoder(x)) == 2
    encoder.stages[1].forward = lambda x, means: x
    with pytest.raises(TrifuseError, match=r"expected stage 1 to append the means .* a Conv2d stands there"):
        encoder(x, 1, lambda features, means: features)
