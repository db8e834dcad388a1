"""Monte Carlo attention: published numbers, the draw and its repetition, the exact moments, and what it refuses."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from golden_numbers import fixture_names, load_fixture
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trifuse.blocks import MonteCarloAttention
from trifuse.blocks.monte_carlo_attention import hidden_width
from trifuse.kernels import ShapeError, TrifuseError, backend, monte_carlo_pool

GROUP = "monte_carlo_attention"
FIXTURES = [name for name in fixture_names(GROUP) if not name.endswith("hidden_width_table")]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
RUNS = [("torch", torch.float64), ("torch", torch.float32), ("reference", torch.float64)]
RUNS += [pytest.param("triton", torch.float32, marks=interpreted)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_block(dim=8, dtype=torch.float32, **options):
    block = MonteCarloAttention(dim, **options).to(dtype)
    block.reset_parameters(seeded())
    return block


def random_maps(shape=(2, 8, 5, 7), dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype).requires_grad_()


# ------------------------------------------------------------------------------------------- published numbers


def golden_block(fixture, dtype):
    options = fixture.facts["constructor"]
    block = MonteCarloAttention(options["InChannels"], scales=options.get("PoolRes", (1, 2, 3)))
    names = {"squeeze": "SELayer.0.Conv", "excite": "SELayer.1.Conv"}
    state = {f"{ours}.{kind}": fixture.tensors[f"param.{names[ours]}.{kind}"] for ours, kind in GOLDEN_PARAMETERS}
    block.load_state_dict(state)
    return block.to(dtype), {f"{ours}.{kind}": f"{names[ours]}.{kind}" for ours, kind in GOLDEN_PARAMETERS}


GOLDEN_PARAMETERS = [(layer, kind) for layer in ("squeeze", "excite") for kind in ("weight", "bias")]


def assert_golden(fixture, dtype, results):
    found = {name: (fixture.difference(name, value), fixture.bound(name, dtype)) for name, value in results.items()}
    assert {name: pair for name, pair in found.items() if not pair[0] <= pair[1]} == {}


@pytest.mark.parametrize(("name", "dtype"), RUNS)
@pytest.mark.parametrize("fixture_name", FIXTURES)
def test_golden_evaluation(fixture_name, name, dtype):
    fixture = load_fixture(fixture_name)
    block, published = golden_block(fixture, dtype)
    x = fixture.tensors["input"].to(dtype, copy=True).requires_grad_()
    with backend(name):
        out = block.eval()(x)
        out.backward(fixture.tensors["cotangent"].to(dtype))
    results = {"eval.out": out, "eval.dinput": x.grad}
    results |= {f"eval.grad.{published[key]}": p.grad for key, p in block.named_parameters()}
    assert set(results) == set(fixture.expected("eval."))
    assert_golden(fixture, dtype, results)


@pytest.mark.parametrize(("name", "dtype"), RUNS)
@pytest.mark.parametrize("fixture_name", FIXTURES)
def test_golden_training_draws(fixture_name, name, dtype, monkeypatch):
    fixture = load_fixture(fixture_name)
    block, _ = golden_block(fixture, dtype)
    checked = set()
    for index, draw in enumerate(fixture.facts["train_draws"]):
        case = f"train{index}"
        order = fixture.tensors.get(f"{case}.spatial_perm")
        assert draw["order_shuffled"] == (order is not None)
        x = fixture.tensors["input"].to(dtype, copy=True).requires_grad_()
        drawn = torch.tensor(draw["pool"]), torch.tensor(draw["picked_cell"]), order
        monkeypatch.setattr(block, "draw_cell", lambda x, generator, drawn=drawn: drawn)
        with backend(name):
            pooled = monte_carlo_pool(x, scale=drawn[0], cell=drawn[1], permutation=order)
            out = block.train()(x)
            out.backward(fixture.tensors["cotangent"].to(dtype))
        hidden = torch.relu(F.conv2d(pooled[:, :, None, None], block.squeeze.weight, block.squeeze.bias))
        gate = torch.sigmoid(F.conv2d(hidden, block.excite.weight, block.excite.bias))
        results = {"out": out, "dinput": x.grad, "pooled": pooled[:, :, None, None], "gate": gate}
        assert_golden(fixture, dtype, {f"{case}.{key}": value for key, value in results.items()})
        checked |= {f"{case}.{key}" for key in results}
    stored = {key for key in fixture.expected("train") if not key.endswith("spatial_perm")}
    assert checked == stored


def test_golden_hidden_width_table():
    table = load_fixture(f"{GROUP}/hidden_width_table").facts["InChannels_to_hidden"]
    assert {dim: hidden_width(int(dim)) for dim in table} == table
    assert [hidden_width(dim) for dim in (576, 288, 144, 72)] == [144, 72, 40, 32]
    assert MonteCarloAttention(144).squeeze.weight.shape == (40, 144, 1, 1)


# ------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("gate", ["se", "none"])
def test_evaluation_is_deterministic_and_sees_each_sample_alone(gate):
    block, x = random_block(gate=gate, dtype=torch.float64).eval(), random_maps((3, 8, 5, 7), torch.float64)
    out = block(x)
    state = torch.get_rng_state()
    for seed in range(8):  # a drawn scale of 1 would be the whole map, too
        assert torch.equal(block(x, seeded(seed)), out)
    assert torch.equal(torch.get_rng_state(), state)
    for i in range(3):
        torch.testing.assert_close(block(x[i : i + 1]), out[i : i + 1], rtol=1e-14, atol=1e-14)
    mean = x.mean((2, 3), keepdim=True)
    if gate == "none":
        torch.testing.assert_close(out, x * mean)
    else:
        hidden = torch.relu(F.conv2d(mean, block.squeeze.weight, block.squeeze.bias))
        torch.testing.assert_close(out, x * torch.sigmoid(F.conv2d(hidden, block.excite.weight, block.excite.bias)))


# --------------------------------------------------------------------------------------------------- the draw


@pytest.mark.parametrize("draw", ["batch", "sample"])
@given(
    seed=st.integers(0, 2**32 - 1), shuffle=st.booleans(), scales=st.lists(st.integers(1, 5), min_size=1, max_size=3)
)
def test_k33_property_the_same_generator_makes_the_same_legal_choice(draw, seed, shuffle, scales):
    block = random_block(draw=draw, order_shuffle=shuffle, scales=scales)
    x = random_maps((3, 8, 4, 5))
    scale, cell, order = block.draw_cell(x, seeded(seed))
    for value in (scale, cell):
        assert (value.dtype, value.shape) == (torch.int64, () if draw == "batch" else (3,))
    assert set(scale.reshape(-1).tolist()) <= set(scales)
    assert ((cell >= 0) & (cell < scale.square())).all()
    assert (order is not None) == shuffle
    if shuffle:
        assert torch.equal(order.sort(-1).values, torch.arange(20).expand_as(order))
    torch.manual_seed(seed)
    drawn = block.draw_cell(x)
    torch.manual_seed(seed)
    for repeated in (block.draw_cell(x), drawn):
        assert all(torch.equal(a, b) for a, b in zip(repeated, drawn, strict=True) if a is not None)
    out = [block(x, generator) for generator in (seeded(seed), seeded(seed))]
    assert torch.equal(*out)


def test_an_empty_batch_draws_nothing():
    x = random_maps((0, 8, 4, 5))
    assert random_block(draw="sample")(x).shape == x.shape
    assert random_block()(x).shape == x.shape


def chi_square(counts, probabilities):
    total = sum(counts)
    return sum((n - total * p) ** 2 / (total * p) for n, p in zip(counts, probabilities, strict=True))


@pytest.mark.parametrize("probabilities", [None, (0.5, 0.2, 0.3)], ids=str)
def test_k33_exactly_one_scale_and_one_cell_with_their_probabilities(probabilities):
    """At 2 and 13 degrees of freedom, 1 in 1000 samples of the right distribution lies above 13.8 and 34.5."""
    block = random_block(order_shuffle=False, draw="sample", scale_probs=probabilities)
    assert sum(block.scale_probs) == pytest.approx(1)
    scale, cell, _ = block.draw_cell(torch.empty(20000, 8, 1, 1), seeded(11))
    one_hot = torch.stack([scale == k for k in block.scales], 1)
    assert torch.equal(one_hot.sum(1), torch.ones(20000, dtype=torch.int64))
    assert chi_square(one_hot.sum(0).tolist(), block.scale_probs) < 13.8
    cells = [(k, c, p / k**2) for k, p in zip(block.scales, block.scale_probs, strict=True) for c in range(k**2)]
    counts = [int(((scale == k) & (cell == c)).sum()) for k, c, _ in cells]
    assert chi_square(counts, [p for *_, p in cells]) < 34.5


def test_samples_draw_apart_from_each_other():
    block = random_block(draw="sample")
    scale, cell, order = block.draw_cell(torch.empty(64, 8, 4, 5), seeded())
    assert len(set(zip(scale.tolist(), cell.tolist(), strict=True))) > 5
    assert not torch.equal(order[0], order[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("draw", ["batch", "sample"])
def test_checkpointing_repeats_the_draws(use_reentrant, draw):
    """Three checkpointed stretches of two calls each: backward visits them in the other order."""

    def run(checkpointed):
        block, x = random_block(draw=draw, dtype=torch.float64), random_maps(dtype=torch.float64)
        torch.manual_seed(3)
        maps = x
        for _ in range(3):
            stretch = lambda maps: block(F.dropout(block(maps), 0.1))  # noqa: E731
            maps = checkpoint(stretch, maps, use_reentrant=use_reentrant) if checkpointed else stretch(maps)
        maps.square().sum().backward()
        return [maps, x.grad, *(p.grad for p in block.parameters())]

    torch.testing.assert_close(run(True), run(False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("draw", ["batch", "sample"])
def test_checkpointing_cannot_repeat_the_draw_of_a_given_generator(use_reentrant, draw):
    block, x = random_block(draw=draw), random_maps()
    out = checkpoint(block, x, seeded(), use_reentrant=use_reentrant)
    with pytest.raises(TrifuseError, match="pass no generator and seed the default one"):
        out.sum().backward()


def test_a_given_generator_leaves_the_default_one_alone():
    block, x = random_block(), random_maps()
    state = torch.get_rng_state()
    block(x, seeded())
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------- exact moments


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (2, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("probabilities", [None, (0.5, 0.2, 0.3)], ids=str)
def test_moments_without_shuffle_are_those_of_all_cells(size, probabilities):
    block = random_block(order_shuffle=False, scale_probs=probabilities)
    x = random_maps((2, 8, *size), torch.float64)
    cells, weights = [], []
    for k, p in zip(block.scales, block.scale_probs, strict=True):
        cells += F.adaptive_avg_pool2d(x, k).flatten(2).unbind(2)
        weights += [p / k**2] * k**2
    weights = torch.tensor(weights, dtype=torch.float64)[:, None, None]
    mean = (weights * torch.stack(cells)).sum(0)
    variance = (weights * torch.stack(cells).square()).sum(0) - mean.square()
    torch.testing.assert_close(block.expected_pool(x), (mean, variance), rtol=1e-10, atol=1e-12)


def test_moments_with_shuffle_are_those_of_all_subsets():
    """Every subset of the positions that a cell may stand for, all equally likely."""
    block, x = random_block(1, scales=(1, 2)), random_maps((1, 1, 2, 3), torch.float64)
    values = x.flatten().detach()
    means, weights = [values.mean()], [0.5]
    for size in (2, 2, 2, 2):  # rows 0 and 1, columns 0-1 and 1-2
        pairs = torch.combinations(torch.arange(6), size)
        means += list(values[pairs].mean(1))
        weights += [0.5 / 4 / len(pairs)] * len(pairs)
    means, weights = torch.stack(means), torch.tensor(weights, dtype=torch.float64)
    mean = (weights * means).sum()
    variance = (weights * (means - mean).square()).sum()
    torch.testing.assert_close([m.squeeze() for m in block.expected_pool(x)], [mean, variance])


@pytest.mark.parametrize("shuffle", [True, False])
def test_many_draws_have_these_moments(shuffle):
    """8 rows cut in 3 are 3, 4 and 3: the cells differ in size, and overlap."""
    block, n = random_block(2, order_shuffle=shuffle, draw="sample"), 4000
    x = random_maps((1, 2, 8, 8), torch.float64).detach()
    scale, cell, order = block.draw_cell(x.expand(n, -1, -1, -1), seeded(2))
    pooled = monte_carlo_pool(x.expand(n, -1, -1, -1), scale=scale, cell=cell, permutation=order)
    mean, variance = (moment[0] for moment in block.expected_pool(x))
    assert ((pooled.mean(0) - mean).abs() <= 4 * (variance / n).sqrt()).all()
    fourth = (pooled - mean).pow(4).mean(0)
    assert ((pooled.var(0) - variance).abs() <= 4 * ((fourth - variance.square()) / n).sqrt()).all()


def test_mean_over_many_draws_is_close_to_evaluation():
    """The literal form is linear in the descriptor, whose expectation is the global mean."""
    block, x = random_block(gate="none", draw="sample"), random_maps((1, 8, 8, 8)).detach()
    n = 4000
    out = block.train()(x.expand(n, -1, -1, -1), seeded(4)).mean(0)
    _, variance = block.expected_pool(x)
    allowed = 4.5 * x[0].abs() * (variance[0] / n).sqrt()[:, None, None]
    assert ((out - block.eval()(x)[0]).abs() <= allowed).all()


# ---------------------------------------------------------------------------------------------- house manners


def test_every_parameter_gets_a_gradient():
    block = random_block()
    block(random_maps(), seeded()).square().sum().backward()
    assert {name for name, p in block.named_parameters() if p.grad is None or not p.grad.any()} == set()
    assert list(MonteCarloAttention(8, gate="none").parameters()) == []


def test_b14_copies_and_pickles():
    block, x = random_block(), random_maps()
    stream = io.BytesIO()
    torch.save(block, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(block), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(x, seeded()), block(x, seeded()))


@pytest.mark.parametrize("gate", ["se", "none"])
def test_k25_autocast_trains(gate):
    block, x = random_block(gate=gate), random_maps()
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x, seeded())
    out.sum().backward()
    torch.testing.assert_close(out.float(), block(x, seeded()), atol=3e-2, rtol=3e-2)
    assert x.grad.dtype == torch.float32


def test_b3_b4_refuses_maps_that_do_not_fit():
    with pytest.raises(ShapeError, match=r"x has shape \(8, 5, 7\); expected \(B, 8, H, W\)"):
        random_block()(random_maps()[0])
    with pytest.raises(ShapeError, match=r"x has shape \(2, 5, 7, 8\).*permute\(0, 3, 1, 2\)"):
        random_block().expected_pool(random_maps().permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "max"}, "gate: expected one of .*, got 'max'"),
        ({"draw": "pixel"}, "draw: expected one of .*, got 'pixel'"),
        ({"scales": (0, 1)}, r"scales must be whole numbers of at least 1, got \(0, 1\)"),
        ({"scales": ()}, "scales must be whole numbers"),
        ({"scale_probs": (0.5, 0.5)}, "one probability for each of the scales"),
        ({"scale_probs": (0.5, 0.2, 0.2)}, "adding up to 1"),
        ({"scale_probs": (1.5, -0.5, 0.0)}, "adding up to 1"),
        ({"scale_probs": (math.nan, 0.5, 0.5)}, "adding up to 1"),
    ],
)
def test_refuses_options_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        MonteCarloAttention(8, **options)
