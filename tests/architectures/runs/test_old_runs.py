"""Runs that an older trifuse wrote still load, go on, predict and are scored; see support/old_runs/README.md."""

from __future__ import annotations

import csv
import gzip
import json
import math
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trifuse.architectures.cli.main import main
from trifuse.architectures.data.volumes.nifti import read_labels
from trifuse.architectures.dino_unet import DinoUNet
from trifuse.architectures.dino_unet.train import DinoUNetRecipe
from trifuse.architectures.evaluation.tables import read_case_table
from trifuse.architectures.fias import Fias
from trifuse.architectures.fias.train import FiasRecipe
from trifuse.architectures.plain_unet import PlainUNet
from trifuse.architectures.plain_unet.train import PlainUNetRecipe
from trifuse.architectures.runs.recipes import recipe_from
from trifuse.architectures.storage.config_json import config_from_json, config_to_json, upgraded_json
from trifuse.architectures.taff_unet import EcgAutoencoder, TaffUNet, TaffUNetConfig
from trifuse.architectures.taff_unet.pretrain import EcgPretrainingRecipe
from trifuse.architectures.taff_unet.train import TaffUNetRecipe
from trifuse.architectures.training.loop import FREE_TO_CHANGE

OLD_RUNS = Path(__file__).parents[2] / "support" / "old_runs"
COMMANDS = {
    argv[argv.index("--out") + 1]: argv[1:]
    for argv in map(shlex.split, (OLD_RUNS / "commands.txt").read_text().splitlines())
}
COHORTS = {
    "dino_unet/learned": "cohorts/hearts",
    "dino_unet/fixed": "cohorts/hearts",
    "dino_unet/rerun": "cohorts/hearts",
    "fias/run": "cohorts/abdomens",
    "plain_unet/run": "cohorts/hearts",
    "taff_unet/full": "cohorts/hearts",
}
NETWORKS = {"dino_unet": DinoUNet, "fias": Fias, "plain_unet": PlainUNet, "taff_unet": TaffUNet}
AUTOENCODERS = ("ecg/records", "ecg/study")
RECIPES = {
    "dino_unet": DinoUNetRecipe,
    "fias": FiasRecipe,
    "plain_unet": PlainUNetRecipe,
    "taff_unet": TaffUNetRecipe,
    "ecg": EcgPretrainingRecipe,
}
FIRST_NETWORKS = {  # what older versions did, and is no default today
    "taff_unet": {"projection": "broadcast", "gate": "after_norm", "gate_time": "unseen"},
    "fias": {"channel_weights": "literal"},
}
ASKED_FOR = {  # so it has to be asked for
    run: [
        word
        for name, value in FIRST_NETWORKS[run.partition("/")[0]].items()
        for word in ("--set", f"network.{name}={value}")
    ]
    for run in ("taff_unet/full", "fias/run")
}
SAME_SHARE = 0.999  # of the voxels: another processor rounds in another way


@pytest.fixture
def old_runs(tmp_path, monkeypatch) -> Path:
    """Return a copy of the old runs, with their weights unpacked, as the working directory that the runs had."""
    root = tmp_path / "old_runs"
    shutil.copytree(OLD_RUNS, root)
    for packed in root.rglob("*.safetensors.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    for last in root.rglob("last/model.safetensors"):  # where the last epoch was the best, the weights are kept once
        best = last.parents[1] / "best" / last.name
        if not best.exists():
            shutil.copyfile(last, best)
    monkeypatch.chdir(root)
    return root


def run_main(*argv: object) -> None:
    assert main([str(argument) for argument in argv]) == 0


def table(path: Path | str) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def assert_close(rows: list[dict[str, str]], expected: list[dict[str, str]], tolerance: float) -> None:
    """Compare two tables: numbers closely, words exactly; seconds do not count."""
    assert len(rows) == len(expected)
    for row, want in zip(rows, expected, strict=True):
        assert row.keys() == want.keys()
        for name in row.keys() - {"seconds"}:
            try:
                number = float(want[name])
            except ValueError:
                assert row[name] == want[name], name
            else:
                assert float(row[name]) == pytest.approx(number, rel=tolerance, abs=tolerance, nan_ok=True), name


def assert_same_labels(found: Path, expected: Path) -> None:
    paths = sorted(expected.glob("*.nii.gz"))
    assert paths
    for path in paths:
        labels, want = (read_labels(folder / path.name).voxels for folder in (found, expected))
        assert len(np.unique(want)) > 1
        assert (labels == want).mean() >= SAME_SHARE, path.name


# One of each kind of run; that the others load and compute as they did is tested below.
GO_ON = ("dino_unet/rerun", "fias/run", "plain_unet/run", "ecg/study")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in GO_ON else pytest.mark.slow) for name in (*COHORTS, *AUTOENCODERS)],
)
def test_a_stopped_run_goes_on_to_the_end_that_it_would_have_had(name, old_runs):
    run, whole = old_runs / name, old_runs / f"{name}_whole"
    done = table(run / "log.csv")
    weights = (run / "last" / "training_state.json").read_bytes()
    run_main(*COMMANDS[name], *ASKED_FOR.get(name, ()), "--resume")
    log = table(run / "log.csv")
    assert log[: len(done)] == done
    assert len(log) == len(done) + 1
    assert (run / "last" / "training_state.json").read_bytes() != weights
    assert_close(log, table(whole / "log.csv"), 1e-3)
    assert (run / "report.md").stat().st_size > 1000
    if name in AUTOENCODERS:
        assert_close(table(run / "reconstruction.csv"), table(whole / "reconstruction.csv"), 1e-3)
    else:
        scores, want = ([row.scores["dsc"] for row in read_case_table(of / "test_cases.csv")] for of in (run, whole))
        assert max(want) > 0.3
        assert scores == pytest.approx(want, abs=0.02)


def waves(*shape: int) -> torch.Tensor:
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float32)).reshape(shape)


@pytest.mark.parametrize("name", COHORTS)
def test_a_network_computes_what_it_did(name, old_runs):
    """Its logits tell more than label maps do, which stay the same when little is wrong."""
    network = NETWORKS[name.split("/")[0]]
    model = network.from_pretrained(old_runs / name / "best").eval()
    side = json.loads((old_runs / name / "run.json").read_text())["config"]["data"]["image_size"]
    side_inputs = {
        "prior": (waves(2, 17, side, side) > 0.9).to(torch.uint8),
        "ecg": waves(2, 12, 608),
        "interval": torch.tensor([3.0, 60.0]),
        "has_ecg": torch.tensor([True, False]),
    }
    with torch.inference_mode():
        image = waves(2, 3 if network is DinoUNet else 1, side, side)
        logits = model(image, **(side_inputs if network is TaffUNet else {}))[:, :, 1::4, 1::4]
    torch.testing.assert_close(logits, torch.from_numpy(np.load(f"{name}_logits.npy")), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", COHORTS)
def test_a_run_predicts_as_it_did(name, old_runs):
    run_main("predict", name, COHORTS[name], "--out", "labels")
    assert_same_labels(old_runs / "labels", old_runs / f"{name}_labels")


def test_a_prior_from_given_label_maps_is_what_it_was(old_runs):
    run_main("predict", "taff_unet/full", "cohorts/hearts", "--out", "labels", "--prior-labels", "cohorts/hearts/seg")
    assert_same_labels(old_runs / "labels", old_runs / "taff_unet/full_prior_labels")


def test_a_network_without_its_run_predicts_as_it_did(old_runs):
    (old_runs / "plain_unet" / "run" / "run.json").unlink()
    spacing = json.loads((old_runs / "plain_unet/network_labels/predictions.json").read_text())["patches"]["spacing_mm"]
    run_main("predict", "plain_unet/run/best", "cohorts/hearts", "--out", "labels", "--spacing", *spacing)
    assert_same_labels(old_runs / "labels", old_runs / "plain_unet/network_labels")


@pytest.mark.parametrize("name", ["dino_unet/rerun", "plain_unet/run"])
def test_an_old_folder_of_predictions_is_completed_and_made_anew(name, old_runs, capsys):
    """It does not say which images its label maps show."""
    labels = old_runs / f"{name}_labels"
    first, *others = sorted(labels.glob("*.nii.gz"))
    first.unlink()
    run_main("predict", name, COHORTS[name], "--out", labels)
    assert f"{len(others)} label maps made anew" in capsys.readouterr().err
    assert_same_labels(labels, OLD_RUNS / f"{name}_labels")


def test_old_predictions_are_scored_as_they_were(old_runs):
    run_main("evaluate", "plain_unet/run_labels", "cohorts/hearts", "--out", "scores.csv")
    assert_close(table("scores.csv"), table("plain_unet/run_scores.csv"), 1e-9)


def test_old_tables_are_compared(old_runs, capsys):
    run_main("compare", "plain_unet/run_whole", "taff_unet/full_whole", "--out", "comparison.csv")
    assert "scar" in capsys.readouterr().out
    assert {row["class_name"] for row in table("comparison.csv")} >= {"blood pool", "myocardium", "scar"}


def test_old_repeats_are_completed(old_runs):
    repeats = old_runs / "plain_unet" / "repeats"
    first = table(repeats / "run_1" / "test_cases.csv")
    by_dice = ("--set", "training.best_epoch_by=val_dice")  # nobody looks whether cases validate before the first run
    assert main([*COMMANDS["plain_unet/repeats"], "--resume"]) == 2
    run_main(*COMMANDS["plain_unet/repeats"], *by_dice, "--resume")
    assert_close(table(repeats / "run_1" / "test_cases.csv"), first, 0.02)
    scores = [row for row in table(repeats / "runs.csv") if row["conventions"].startswith("empty_masks=strict")]
    assert_close(scores, table("plain_unet/repeats_whole/runs.csv"), 0.02)  # which knew of no other protocol


def test_an_old_autoencoder_computes_what_it_did(old_runs):
    model = EcgAutoencoder.from_pretrained(old_runs / "ecg" / "small").eval()
    with torch.inference_mode():
        beats = model(waves(2, 12, 4))
    torch.testing.assert_close(beats, torch.from_numpy(np.load("ecg/small/expected.npy")), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", RECIPES)
def test_an_old_recipe_of_defaults_is_the_recipe_of_defaults(network):
    values = json.loads((OLD_RUNS / network / "default_recipe.json").read_text())
    recipe = RECIPES[network]()
    training = recipe.training.settled(validates=True)  # which was the only choice
    training = training.on(torch.device("cpu"))  # as all devices computed
    expected = replace(recipe, network=replace(recipe.network, **FIRST_NETWORKS.get(network, {})), training=training)
    assert config_from_json(RECIPES[network], values, "default_recipe.json") == expected


@pytest.mark.parametrize("network", RECIPES)
def test_an_old_recipe_says_what_it_did_in_each_field_of_today(network):
    """A field that is missing in an old run's description would keep it from being resumed."""
    values = json.loads((OLD_RUNS / network / "default_recipe.json").read_text())
    upgraded = upgraded_json(RECIPES[network], values)
    free = {f"training.{name}" for name in FREE_TO_CHANGE}  # which no description has
    assert field_names(upgraded) - free == field_names(config_to_json(RECIPES[network]())) - free


def field_names(values: dict, prefix: str = "") -> set[str]:
    names: set[str] = set()
    for name, value in values.items():
        names |= field_names(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"}
    return names


@pytest.mark.parametrize("spatial_mlp", [None, 3])
def test_an_old_fusion_is_what_it_was(spatial_mlp, old_runs, tmp_path):
    """One value per channel, or a grid that stayed where it was; its gate saw the code and the normalised map."""
    description = json.loads((old_runs / "taff_unet/full/best/config.json").read_text())
    old = {**description["config"], "spatial_mlp": spatial_mlp}
    assert "projection" not in old
    config = config_from_json(TaffUNetConfig, old, "config.json")
    assert (config.projection, config.grid_side) == ("broadcast" if spatial_mlp is None else "grid", spatial_mlp)
    assert not config.takes_transform
    assert not config.rectifies
    fusion = TaffUNet(config).fusion
    assert (fusion.normalise_code, fusion.gate.slope, fusion.scores, fusion.direction) == (False, 0.0, None, None)
    assert fusion.projection.out_features == fusion.dim * (spatial_mlp or 1) ** 2
    again = config_from_json(TaffUNetConfig, config_to_json(config), "config.json")
    assert again == config


def test_an_old_fias_is_what_it_was(old_runs, tmp_path):
    description = json.loads((old_runs / "fias/run/best/config.json").read_text())
    assert not {"channel_weights", "dilations"} & description["config"].keys()
    model = Fias.from_pretrained(old_runs / "fias/run/best")
    assert (model.config.channel_weights, model.config.dilations) == ("literal", (1, 2, 3))
    assert {fusion.channel_weights for fusion in model.fusions} == {"literal"}
    model.save_pretrained(tmp_path)
    assert Fias.from_pretrained(tmp_path).config == model.config


def test_an_old_fias_is_not_resumed_as_another(old_runs, capsys):
    assert main([*COMMANDS["fias/run"], "--resume"]) == 2
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert [line for line in lines if line.startswith(("config.", "recipe."))] == [
        "config.network.channel_weights: 'literal' -> 'normalised'"
    ]


def test_an_old_taff_unet_is_not_resumed_as_another(old_runs, capsys):
    """Today's default would fuse in another way: it says which fields to ask for, and those are all."""
    assert main([*COMMANDS["taff_unet/full"], "--resume"]) == 2
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert [line for line in lines if line.startswith("config.")] == [
        "config.network.gate: 'after_norm' -> 'before_norm'",
        "config.network.projection: 'broadcast' -> None",
        "config.network.gate_time: 'unseen' -> None",
    ]


@pytest.mark.parametrize(
    ("network", "old", "new"),
    [
        ("dino_unet", "network.block_selection=learned", "network.blocks=null"),
        ("dino_unet", "network.block_selection=last4", "network.blocks=last4"),
        ("dino_unet", "network.block_selection=fixed:[7,5,3,1]", "network.blocks=[7,5,3,1]"),
        ("dino_unet", "network.stream_gradient=rerun", "network.stream_gradient=recompute"),
        ("fias", "data.preparation.resize=linear", "data.preprocessing.resize=linear"),
        ("ecg", "data.kind=study", "data.kind=cohort"),
        ("taff_unet", "network.spatial_mlp=4", "network.grid_side=4"),
        ("taff_unet", "network.gate_sees_time=true", "network.gate_time=joined"),
    ],
)
def test_old_words_of_a_recipe_mean_what_they_did(network, old, new):
    kind, given = RECIPES[network], {"data.root": "cohorts/hearts"}
    with_it = {"stream": ["network.stream_fusion=true"], "spatial_mlp": ["network.projection=grid"]}
    others = [setting for word, settings in with_it.items() if word in old for setting in settings]
    recipe = recipe_from(kind, given=given, settings=[*others, old])
    assert recipe == recipe_from(kind, given=given, settings=[*others, new])
    assert ("learned" in old) == (recipe == recipe_from(kind, given=given))
