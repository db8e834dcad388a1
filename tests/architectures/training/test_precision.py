"""In what precision a run computes: chosen by its device, recorded, kept when it is resumed, and said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_run import StopAt, TinyNet, bits, run

from trifuse.architectures.plain_unet.train import PlainUNetRecipe
from trifuse.architectures.runs.run_description import describe_recipe
from trifuse.architectures.training import precision
from trifuse.architectures.training.precision import computing, precision_lines, precision_on
from trifuse.architectures.training.run_folder import OutputFolderError
from trifuse.architectures.training.signals import Interrupted

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
TF32 = (torch.backends.cuda.matmul, torch.backends.cudnn)
PRODUCTS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)


@pytest.fixture
def gpu_of(monkeypatch):
    """Let GPU number 1 have a compute capability, on NVIDIA's platform or AMD's."""

    def capable(capability: tuple[int, int], hip: str | None = None) -> None:
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", {GPU: capability}.__getitem__)

    return capable


@pytest.fixture
def in_bf16(monkeypatch):
    """Let every device compute in bf16."""
    monkeypatch.setattr(precision, "_computes_in_bf16", lambda device: True)


def allowed() -> list[bool]:
    return [backend.allow_tf32 for backend in TF32]


def recorded(out: Path) -> str:
    return json.loads((out / "run.json").read_text())["recipe"]["precision"]


@pytest.mark.parametrize(
    ("capability", "hip", "chosen"),
    [((7, 5), None, "fp32"), ((8, 0), None, "bf16"), ((9, 0), None, "bf16"), ((7, 5), "6.4", "bf16")],
)
def test_auto_is_bf16_where_the_gpu_computes_in_it(gpu_of, capability, hip, chosen):
    gpu_of(capability, hip)
    assert (precision_on(GPU, "auto"), precision_on(CPU, "auto")) == (chosen, "fp32")


@pytest.mark.parametrize("named", ["fp32", "bf16", "fp16"])
def test_a_precision_that_is_named_is_kept_everywhere(gpu_of, named):
    gpu_of((7, 0))
    assert precision_on(GPU, named) == precision_on(CPU, named) == named


def test_a_run_computes_in_what_auto_means_and_records_it(tmp_path):
    run(tmp_path / "auto", precision="auto")
    run(tmp_path / "fp32", precision="fp32")
    assert bits(tmp_path / "auto") == bits(tmp_path / "fp32")
    assert recorded(tmp_path / "auto") == "fp32"
    (session,) = map(json.loads, (tmp_path / "auto" / "sessions.jsonl").read_text().splitlines())
    assert session["precision"] == "fp32"


def test_a_run_on_a_device_with_bf16_computes_in_it(tmp_path, in_bf16):
    seen = []

    def forward(model, batch):
        outputs = model(batch["image"])
        seen.append(outputs.dtype)
        return outputs

    run(tmp_path, model=TinyNet(), precision="auto", forward=forward)
    assert set(seen) == {torch.bfloat16}
    assert recorded(tmp_path) == "bf16"


def test_a_run_is_not_gone_on_with_in_another_precision_unasked(tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        run(tmp_path, precision="auto", forward=StopAt(4))
    monkeypatch.setattr(precision, "_computes_in_bf16", lambda device: True)
    with pytest.raises(OutputFolderError, match="precision: 'fp32' -> 'bf16'"):
        run(tmp_path, precision="auto", resume=True)
    run(tmp_path, precision="fp32", resume=True)
    assert recorded(tmp_path) == "fp32"


def test_what_is_prepared_is_described_as_its_device_runs_it(monkeypatch):
    recipe = PlainUNetRecipe()
    assert recipe.training.precision == "auto"
    assert describe_recipe(recipe)["training"]["precision"] == "fp32"
    monkeypatch.setattr(precision, "_computes_in_bf16", lambda device: True)
    assert describe_recipe(recipe)["training"]["precision"] == "bf16"


@pytest.mark.parametrize(("tf32", "flags"), [("on", [True, True]), ("off", [False, False]), ("default", None)])
def test_tf32_is_as_asked_for_inside_a_block_and_as_before_after_it(tf32, flags):
    before, inside = allowed(), []

    def fails():
        with computing(CPU, "auto", tf32, print):
            inside.append(allowed())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert inside == [flags or before]
    assert allowed() == before


def settings() -> list[str]:
    return [torch.backends.fp32_precision, *(each.fp32_precision for each in PRODUCTS)]


@pytest.fixture
def newer_names():
    """Let a test set precisions by PyTorch's newer names, beside which the older ones cannot always be read."""
    before = settings()
    yield
    torch.backends.fp32_precision = before[0]
    for backend, was in zip(TF32, (False, True), strict=True):
        backend.allow_tf32 = was
    for each, was in zip(PRODUCTS, before[1:], strict=True):
        each.fp32_precision = was


@pytest.mark.parametrize("tf32", ["default", "on", "off"])
@pytest.mark.parametrize("own", [{}, {0: "ieee"}, {1: "tf32"}, {2: "ieee"}, {3: "ieee"}, {0: "tf32", 2: "ieee"}])
def test_settings_by_their_newer_names_are_kept(newer_names, tf32, own):
    for place, chosen in own.items():
        [torch.backends, *PRODUCTS][place].fp32_precision = chosen
    before = settings()
    with computing(CPU, "auto", tf32, print):
        inside = settings()[1:3]
    assert (inside[0] == "tf32", inside[1] == "tf32") == (
        (before[1] == "tf32", before[2] == "tf32") if tf32 == "default" else (tf32 == "on", tf32 == "on")
    )
    assert settings() == before


@pytest.mark.parametrize("general", ["none", "ieee"])
@pytest.mark.parametrize("tf32", ["default", "on", "off"])
def test_matrix_products_follow_the_general_setting_after_a_run_as_before_it(newer_names, tf32, general):
    torch.backends.fp32_precision = general
    with computing(CPU, "auto", tf32, print):
        pass
    torch.backends.fp32_precision = "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.parametrize(("tf32", "flags"), [("on", [True, True]), ("off", [False, False])])
def test_a_run_computes_with_tf32_as_its_recipe_says(tmp_path, tf32, flags):
    before, seen = allowed(), []

    def forward(model, batch):
        seen.append(allowed())
        return model(batch["image"])

    run(tmp_path, tf32=tf32, forward=forward)
    assert all(each == flags for each in seen)
    assert (len(seen) > 0, allowed()) == (True, before)


@pytest.mark.parametrize(
    ("capability", "named", "tf32", "line"),
    [
        ((9, 0), "auto", "on", "bf16, as this GPU computes in it; {} matrix products and convolutions"),
        ((9, 0), "bf16", "off", "bf16; {} no product"),
        ((7, 5), "auto", "default", "fp32; {} convolutions"),
    ],
)
def test_of_a_gpu_it_is_said_what_it_computes_in(gpu_of, capability, named, tf32, line):
    gpu_of(capability)
    with computing(CPU, named, tf32, print):
        said = precision_lines(GPU, named)
    assert said == ["forward pass in " + line.format("float32 numbers are rounded to TF32 in")]


def test_of_a_cpu_nothing_is_said():
    assert precision_lines(CPU, "auto") == []


def test_a_run_says_it_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(precision, "precision_lines", lambda device, named: [f"{device} computes in {named}"])
    run(tmp_path, precision="bf16")
    assert "".join(capsys.readouterr()).count("cpu computes in bf16") == 1
