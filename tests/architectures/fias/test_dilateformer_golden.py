"""The DilateFormer and its blocks against numbers from the published implementation."""

from __future__ import annotations

import pytest
import torch
from golden_numbers import Fixture, fill, filled_input, fixture_names, load_fixture
from torch import Tensor, nn

from trifuse.architectures.fias.dilateformer import DilateFormer, DilateFormerBlock
from trifuse.architectures.fias.variants import DilateFormerShape
from trifuse.blocks import DilatedAttention

BLOCKS = {
    "block_dim24_h3_cpe": lambda: DilateFormerBlock(24, 3),
    "block_dim36_h6_nocpe": lambda: without_positions(DilateFormerBlock(36, 6, mlp_ratio=2.0)),
    "globalblock_dim24_h4_cpe": lambda: DilateFormerBlock(24, 4, dilations=None),
}
ATTENTIONS = {
    "msda_dim24_h3": lambda: DilatedAttention(24, 3),
    "msda_dim32_h4_dil2": lambda: DilatedAttention(32, 4, dilations=(1, 2)),
    "msda_dim48_h6_nobias_k5": lambda: DilatedAttention(48, 6, kernel_size=5, qkv_bias=False),
}
SMALL = DilateFormerShape(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(3, 3, 3, 3))
FILLED_RUNS = [(224, torch.float64), (256, torch.float64), (256, torch.float32)]
KEYS = ("tiny", "small", "base")
DTYPES = (torch.float64, torch.float32)


def test_every_fixture_is_used():
    assert set(fixture_names("dilateformer_modules")) == {f"dilateformer_modules/{n}" for n in (*BLOCKS, *ATTENTIONS)}
    full = {f"filled_tiny_{size}" for size, _ in FILLED_RUNS} | {f"keys_{variant}" for variant in KEYS}
    full |= {"small_e12_64_weights", "small_e12_64_features"}
    assert set(fixture_names("dilateformer_full")) == {f"dilateformer_full/{name}" for name in full}


def without_positions(block: DilateFormerBlock) -> DilateFormerBlock:
    nn.init.zeros_(block.pos_embed.weight)
    nn.init.zeros_(block.pos_embed.bias)
    return block


def assert_within(fixture: Fixture, name: str, result: Tensor, dtype: torch.dtype) -> None:
    difference, bound = fixture.difference(name, result), fixture.bound(name, dtype)
    assert difference < bound, f"{fixture.name}: {name} differs by {difference:.2e}, bound {bound:.2e}"


def stored_parameters(fixture: Fixture) -> dict[str, Tensor]:
    return {name.removeprefix("param."): fixture.tensors[name] for name in fixture.expected("param.")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*BLOCKS, *ATTENTIONS])
def test_blocks_values_and_every_gradient(name, dtype):
    fixture = load_fixture(f"dilateformer_modules/{name}")
    module = (BLOCKS | ATTENTIONS)[name]().to(dtype)
    stored = stored_parameters(fixture)
    module.load_state_dict({name: stored.get(name, tensor) for name, tensor in module.state_dict().items()})
    assert {name for name in module.state_dict() if not name.startswith("pos_embed")} <= stored.keys()
    image = fixture.tensors["input"].to(dtype).requires_grad_(True)
    before = image.detach().clone()
    out = in_channels_last(module, image)
    out.backward(fixture.tensors["cotangent"].to(dtype))
    assert torch.equal(image.detach(), before)
    assert_within(fixture, "out", out, dtype)
    assert_within(fixture, "dinput", image.grad, dtype)
    observed = fixture.facts["tolerance_f32_vs_f64"]
    worst = observed.get("param_grads_worst", [observed["dinput"]["rel_l2"]])[0]
    for parameter, tensor in module.named_parameters():
        if parameter in stored:
            bound = 3e-7 if dtype == torch.float64 else max(10 * worst, 2e-6)
            assert fixture.difference(f"grad.{parameter}", tensor.grad) < bound, parameter


def in_channels_last(module: nn.Module, image: Tensor) -> Tensor:
    """The published blocks take (B, C, H, W), and ours (B, H, W, C)."""
    if isinstance(module, DilatedAttention):
        return module(image)
    return module(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------ whole networks


def published_results(encoder: DilateFormer, image: Tensor) -> dict[str, Tensor]:
    """Everything that the encoder computes, by its published name."""
    results: dict[str, Tensor] = {}

    def keep(name: str, channels_last: bool) -> object:
        def hook(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            results[name] = output.permute(0, 3, 1, 2) if channels_last else output

        return hook

    handles = [encoder.patch_embed.register_forward_hook(keep("patch_embed", channels_last=False))]
    for index, stage in enumerate(encoder.stages):
        handles.append(stage.blocks[-1].register_forward_hook(keep(f"stage{index}.blocks_out", channels_last=True)))
        handles.append(stage.downsample.register_forward_hook(keep(f"stage{index}.out", channels_last=False)))
    maps = encoder(image)
    for handle in handles:
        handle.remove()
    for index, features in enumerate(maps[:-1]):
        assert torch.equal(features, results[f"stage{index}.blocks_out"])  # taken before patch merging
    results["norm_tokens"] = maps[-1].flatten(2).transpose(1, 2)
    results["logits"] = encoder.classify(image)
    return results


def check(fixture: Fixture, encoder: DilateFormer, image: Tensor) -> None:
    results = published_results(encoder, image)
    assert results.keys() == fixture.facts["tolerance_f32_vs_f64"].keys()
    for name, result in results.items():
        assert_within(fixture, name, result, image.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_small_network(dtype):
    fixture = load_fixture("dilateformer_full/small_e12_64_features")
    encoder = DilateFormer(SMALL, out_norm=False, num_classes=7).to(dtype).eval()
    encoder.load_state_dict(stored_parameters(load_fixture("dilateformer_full/small_e12_64_weights")))
    check(fixture, encoder, fixture.tensors["input"].to(dtype))


@pytest.mark.parametrize(("size", "dtype"), FILLED_RUNS)
@torch.no_grad()
def test_filled_tiny(size, dtype):
    fixture = load_fixture(f"dilateformer_full/filled_tiny_{size}")
    encoder = DilateFormer("tiny", out_norm=False, num_classes=1000).to(dtype).eval()
    fill(encoder.state_dict())
    check(fixture, encoder, filled_input(fixture.facts).to(dtype))


@pytest.mark.parametrize("variant", KEYS)
def test_names_types_shapes_and_parameter_counts(variant):
    facts = load_fixture(f"dilateformer_full/keys_{variant}").facts
    with torch.device("meta"):
        encoder = DilateFormer(variant, out_norm=False, num_classes=1000)
    state = {
        name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        for name, tensor in encoder.state_dict().items()
    }
    assert state == facts["state_dict_keys"]
    assert len(state) == facts["n_state_entries"]
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in (("", encoder), ("head", encoder.head))}
    assert counts[""] == facts["n_parameters"]
    assert counts[""] - counts["head"] == facts["n_parameters_without_head"]
