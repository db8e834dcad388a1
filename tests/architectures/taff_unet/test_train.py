"""TAFF-UNet from a cohort to a report: an oracle is called one, all pictures are there, new images bring their ECG."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from decision_rows import decisions_of_report
from torch.utils.data import default_collate

from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.samples.augmentation_recipe import AugmentationRecipe
from trifuse.architectures.data.samples.nnunet_augmentation import NnUNetAugmentation
from trifuse.architectures.data.samples.patch_dataset import PatchDataset
from trifuse.architectures.data.samples.preprocessing import Patches, Preprocessing
from trifuse.architectures.runs.audit import audit_run
from trifuse.architectures.runs.pipeline import train
from trifuse.architectures.runs.predict import load_network, predict_images
from trifuse.architectures.runs.recipes import RecipeError, recipe_from
from trifuse.architectures.runs.repeats import train_repeats
from trifuse.architectures.storage.record import read_record
from trifuse.architectures.taff_unet.config import TaffUNetConfig
from trifuse.architectures.taff_unet.ecg_autoencoder import EcgAutoencoder, EcgAutoencoderConfig
from trifuse.architectures.taff_unet.inputs import EcgInputRecipe, PriorRecipe, case_side_inputs
from trifuse.architectures.taff_unet.model import TaffUNet
from trifuse.architectures.taff_unet.paper import RESULTS
from trifuse.architectures.taff_unet.report import Heard, describe_gate
from trifuse.architectures.taff_unet.train import TaffUNetRecipe, check, fit_options, run_with_side_inputs
from trifuse.architectures.training.losses import SegmentationLoss
from trifuse.kernels import CheckpointError, DataError

PICTURES = (
    "bullseye",
    "ecg_bullseye",
    "lead_attention",
    "temporal_attention",
    "gate_weights",
    "interval_bars",
    "exchange_test",
    "curves",
    "test/overlays",
)


def tiny_recipe(cohort: Path, setting: str = "full", **prior) -> TaffUNetRecipe:
    """Return the paper's recipe with a network and patches small enough for a few seconds."""
    recipe = TaffUNetRecipe(network=TaffUNetConfig(setting=setting, base_dim=4))
    patches = Patches(mirror=False, samples_per_epoch=8)
    data = replace(recipe.data, root=str(cohort)).with_preprocessing(image_size=32, patches=patches)
    training = replace(recipe.training, epochs=1, batch_size=4, device="cpu")
    return replace(recipe, data=data, training=training, prior=PriorRecipe(**prior))


@pytest.fixture(scope="module")
def finished(scar_cohort, tmp_path_factory) -> Path:
    """Return a run with an oracle prior."""
    out = tmp_path_factory.mktemp("runs") / "run"
    words = ["trifuse", "train", "taff_unet"]
    assert train(tiny_recipe(scar_cohort, source="gt"), out, command=words) == out / "report.md"
    return out


def test_defaults_are_the_papers():
    recipe = TaffUNetRecipe()
    training = recipe.training
    assert (training.optimizer, training.lr, training.momentum, training.weight_decay) == ("sgd", 1e-2, 0.99, 3e-5)
    assert (training.schedule, training.epochs, training.batch_size, training.grad_clip) == ("poly", 1000, 12, 12.0)
    assert recipe.data.preprocessing.patches.samples_per_epoch == 250 * training.batch_size
    assert (recipe.data.preprocessing.image_size, recipe.data.augment) == (256, "nnunet")
    assert recipe.data.preprocessing == Preprocessing(intensity="zscore", channels=1, image_size=256, patches=Patches())
    assert recipe.network == TaffUNetConfig()
    assert (recipe.lambda_ecg, recipe.ecg_warmup_epochs, recipe.lambda_entropy) == (1.0, 10.0, 3e-3)
    assert recipe.entropy_sign == "maximise"
    assert recipe.prior.source is None
    assert recipe.prior.folds == 5


def test_the_weights_of_the_loss_and_the_widths_are_fields():
    settings = ["batch_dice=false", "lambda_dice=2", "lambda_ce=0.5", "lambda_entropy=0.01", "entropy_sign=literal"]
    widths = ["network.gate_width=16", "network.film_width=8", "network.base_dim=4"]
    recipe = recipe_from(TaffUNetRecipe, given={"data.root": "cohort"}, settings=[*settings, *widths])
    network = TaffUNet(recipe.network)
    loss = fit_options(network, recipe, None, Path())["loss"]
    assert loss.segmentation == SegmentationLoss(batch_dice=False, w_dice=2.0, w_ce=0.5)
    segmentation = "2 Dice (of each sample) + 0.5 cross-entropy, at all resolutions but the coarsest"
    assert loss.words(with_ecg=False) == segmentation
    rest = "+ 1 reconstruction of the ECG, reached in 10 epochs; + 0.01 entropy of the gate"
    assert loss.words(with_ecg=True) == f"{segmentation}; {rest}"
    assert (network.fusion.gate.others.first.out_features, network.fusion.film.mlp.first.out_features) == (16, 8)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lambda_dice=-1", r"lambda_dice must be a finite number, and not negative, got -1\.0"),
        ("lambda_ecg=-1", r"lambda_ecg must be finite, and must not be negative, got -1\.0"),
        ("lambda_entropy=-1", "lambda_entropy must be finite, and must not be negative"),
        ("ecg_warmup_epochs=-1", "ecg_warmup_epochs must be a finite number, 0 or more, got -1"),
        ("network.max_days=Infinity", "'max_days': expected a finite number, got inf"),
        ("network.gate_width=0", "gate_width must be at least 1, got 0"),
        ("network.film_width=0", "film_width must be at least 1, got 0"),
        ("batch_dice=2", "expected bool, got 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting, message):
    with pytest.raises(RecipeError, match=message):
        recipe_from(TaffUNetRecipe, given={"data.root": "cohort"}, settings=[setting])


def test_the_network_follows_the_size_of_the_patches():
    recipe = TaffUNetRecipe()
    assert replace(recipe, data=recipe.data.with_preprocessing(image_size=128)).network.image_size == 128
    whole = replace(recipe.data.preprocessing, patches=None)
    with pytest.raises(ValueError, match=r"data\.preprocessing\.patches: this network is trained on patches"):
        replace(recipe, data=replace(recipe.data, augment="none", preprocessing=whole))
    with pytest.raises(ValueError, match=r"data\.preprocessing\.channels must be 1, got 3"):
        replace(recipe, data=recipe.data.with_preprocessing(channels=3))


def test_nothing_is_trained_before_the_prior_is_chosen(scar_cohort, tmp_path):
    for train_some in (train, lambda recipe, out: train_repeats(recipe, out, 2)):
        with pytest.raises(RecipeError, match="has no default"):
            train_some(tiny_recipe(scar_cohort), tmp_path / "run")
    with pytest.raises(RecipeError, match="--strict"):
        train(replace(tiny_recipe(scar_cohort, source="gt"), strict=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_autoencoder_of_other_beats_is_refused_before_anything_is_trained(scar_cohort, tmp_path):
    EcgAutoencoder(EcgAutoencoderConfig(lead_scaling="voltage")).save_pretrained(tmp_path / "ecg")
    recipe = tiny_recipe(scar_cohort, source="predicted")
    recipe = replace(recipe, network=replace(recipe.network, ecg_checkpoint=str(tmp_path / "ecg")))
    with pytest.raises(CheckpointError, match=r"got lead_scaling='voltage', want lead_scaling='zscore'"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_e11_an_oracle_is_called_one_in_the_report(finished):
    report = (finished / "report.md").read_text()
    assert report.startswith("# TAFF-UNet (full, oracle prior) on phantom")
    scar, *others = (line for line in report.split("##")[0].splitlines() if "DSC" in line)
    assert re.match(r"\*\*DSC \S+( ± \S+)?\*\* for scar, .*`strict`\. The mean of classes is ", scar)
    assert others == []
    assert "| Prior | oracle prior: AHA-17 of the reference annotation (an oracle), angles from landmarks |" in report
    assert "### Test cases, per volume (oracle prior)" in report
    assert "## Test cases: predictions beside the truth (oracle prior)" in report
    assert "this network, oracle prior" in (finished / "figures" / "bullseye.csv").read_text()
    assert "this network, oracle prior" in (finished / "figures" / "interval_bars.csv").read_text()
    assert "| Setting | full |" in report
    assert "| Loss | 1 Dice (pooled over the batch) + 1 cross-entropy, at all resolutions but the coarsest; +" in report
    assert f"| Augmentation | {AugmentationRecipe().describe('nnunet')} |" in report
    assert "started from random weights" in report
    assert RESULTS.title in report
    run = json.loads((finished / "run.json").read_text())["config"]
    assert run["prior"]["source"] == "gt"
    assert run["data"]["preprocessing"]["patches"]["spacing_mm"] is not None  # fixed when the run was prepared


def test_a_report_says_what_the_run_settled(finished):
    decided = decisions_of_report((finished / "report.md").read_text())
    assert decided["Prior: comes from"] == [
        "not said (yours to make)",
        "reference annotation",
        "",
        "`prior.source`, `labels`",
    ]
    assert decided["Pixels of patches, mm"][1:3] == ["median of the training cases", ""]
    assert decided["Split"][1:3] == ["the cohort's own", ""]
    assert decided["Gate: sign of the entropy"][1:3] == ["maximise", "**paper**"]
    assert decided["Batch size"][1:3] == ["4", "default"]


def test_every_picture_is_there_with_its_numbers(finished):
    report = (finished / "report.md").read_text()
    for name in PICTURES:
        assert (finished / "figures" / f"{name}.png").stat().st_size > 5000
        assert f"figures/{name}.png" in report
    for name in ("figures/test/volume_agreement.png", "test_readouts.csv", "test_nnunet_cases.csv"):
        assert f"({name})" in report
        assert (finished / name).is_file()
    burdens = list(csv.DictReader((finished / "figures" / "scar_burden.csv").open()))
    assert [(line["case_id"], line["source"]) for line in burdens] == [
        (case, source) for case in ("case006", "case007") for source in ("truth", "this network, oracle prior")
    ]
    assert float(burdens[0]["segment_1_ml"]) >= 0
    shares = [float(burdens[0][f"segment_{number}_percent"]) for number in range(1, 18)]
    scarred = [float(burdens[0][f"segment_{number}_ml"]) > 0 for number in range(1, 18)]
    assert [share > 0 for share in shares] == scarred
    assert 1 < max(shares) <= 100
    with (finished / "figures" / "gate_weights.csv").open() as lines:
        assert {line["case_id"] for line in csv.DictReader(lines)} == {"case006", "case007"}


def test_a_report_says_how_the_ecg_joins_and_how_much_its_weights_differ(finished):
    report = (finished / "report.md").read_text()
    assert "| ECG's map | per segment of the prior, of rank one (segments) |" in report
    with (finished / "figures" / "gate_weights.csv").open() as lines:
        weights = [float(line["ecg_weight"]) for line in csv.DictReader(lines)]
    sd, low, high = abs(weights[0] - weights[1]) / 2**0.5, min(weights), max(weights)
    mean = sum(weights) / 2
    assert sd > 1e-6
    assert f"| Gate | weight of the ECG {mean:.4f}, SD {sd:.4f} over 2 cases, from {low:.4f} to {high:.4f} |" in report


def test_what_the_ecgs_say_of_the_segments_is_tabulated(finished):
    """For each case the scores of its own ECG, which stand in the picture beside the scar of its case."""
    with (finished / "figures" / "ecg_segment_scores.csv").open() as lines:
        scores = {line.pop("case_id"): [float(value) for value in line.values()] for line in csv.DictReader(lines)}
    assert set(scores) == {"case006", "case007"}
    assert scores["case006"] != scores["case007"]
    picture = list(csv.DictReader((finished / "figures" / "ecg_bullseye.csv").open()))
    assert [float(line["ECG (score)"]) for line in picture] in list(scores.values())
    network, _ = load_network(finished)
    with torch.inference_mode():
        beats = case_side_inputs_of(finished, network)
        for case_id, beat in beats.items():
            expected = network.fusion.segment_scores(network.ecg.encode(beat[None]))[0]
            torch.testing.assert_close(torch.tensor(scores[case_id]), expected.cpu(), rtol=1e-3, atol=1e-4)


def case_side_inputs_of(run: Path, network: TaffUNet) -> dict[str, torch.Tensor]:
    """Return the beats of a run's test cases, read once more from its cohort."""
    cohort = open_cohort(Path(json.loads((run / "run.json").read_text())["config"]["data"]["root"]))
    cases = ("case006", "case007")
    side_inputs = case_side_inputs(cohort, cases, network.config, PriorRecipe("gt"), EcgInputRecipe())
    return {name: extra.constants["ecg"] for name, extra in side_inputs.items()}


def test_a_gate_without_any_ecg_is_said_to_have_none():
    model = TaffUNet(TaffUNetConfig("ecg", image_size=32, base_dim=1, fusion_stage=1))
    assert describe_gate(model, Heard({}, {})) == {"Gate": "no case to be scored has an ECG"}
    assert describe_gate(model, Heard({"a": 0.25}, {}))["Gate"].startswith("weight of the ECG 0.2500, of 1 case")
    assert describe_gate(TaffUNet(TaffUNetConfig("ap", image_size=32, base_dim=1)), Heard({}, {})) == {}


def test_a_grid_that_cannot_follow_its_image_is_refused(scar_cohort, tmp_path):
    """Without a prior; and not where images stay as they are."""
    recipe = tiny_recipe(scar_cohort, "ecg")
    stays = replace(recipe.network, projection="grid", grid_follows_image=False)
    mirrors = Patches(mirror=True, samples_per_epoch=8)
    still = replace(recipe.data, augment="none")

    def augmented(**strengths):
        return replace(recipe.data, augmentation=AugmentationRecipe(**strengths))

    rotation, axes = "data.augmentation.rotation_degrees", "data.augmentation.mirror_axes"
    mirror = "data.preprocessing.patches.mirror"
    for data, turning, remedy in (
        (recipe.data, f"{rotation} and {axes}", f"{rotation} to 0 and {axes} to []"),
        (augmented(rotation_degrees=0.0), axes, f"{axes} to []"),
        (augmented(rotation_probability=0.0), axes, f"{axes} to []"),
        (augmented(mirror_axes=()), rotation, f"{rotation} to 0"),
        (augmented(mirror_probability=0.0), rotation, f"{rotation} to 0"),
        (still.with_preprocessing(patches=mirrors), mirror, f"{mirror} to false"),
        (recipe.data.with_preprocessing(patches=mirrors), f"{rotation} and {axes} and {mirror}", f"{mirror} to false"),
    ):
        refused = replace(recipe, data=data, network=stays)
        with pytest.raises(RecipeError, match=r"grid_follows_image: false leaves the grid .*set it to true") as error:
            train(refused, tmp_path / "run")
        assert f"turned by {turning}, and no prior says where what lies; set it to true, or " in str(error.value)
        assert str(error.value).endswith(remedy)
        check(replace(refused, network=replace(stays, grid_follows_image=True)))
        check(replace(refused, network=replace(stays, setting="full"), prior=PriorRecipe("gt")))
    for upright in (still, augmented(rotation_degrees=0.0, mirror_axes=())):  # scaling and the values may change
        check(replace(recipe, data=upright, network=stays))
    assert not (tmp_path / "run").exists()


def test_batches_tell_a_grid_how_their_images_were_moved(scar_cohort):
    recipe = tiny_recipe(scar_cohort, "ecg_time")
    network = TaffUNet(replace(recipe.network, projection="grid", grid_side=2)).eval()
    cohort = open_cohort(scar_cohort)
    side_inputs = case_side_inputs(cohort, ["case006"], network.config, recipe.prior, recipe.ecg)
    preprocessing = recipe.data.with_preprocessing(patches=Patches(spacing_mm=(6.0, 6.0))).preprocessing
    mirrored = NnUNetAugmentation(rotation_probability=0.0, scale_probability=0.0, mirror_probability=1.0)
    patches = PatchDataset(cohort, ["case006"], preprocessing, augment=mirrored, side_inputs=side_inputs)
    batch = default_collate([patches[0, 0, index] for index in range(2)])
    torch.testing.assert_close(batch["transform"], -torch.eye(2, 3).expand(2, 2, 3))
    with torch.inference_mode():
        moved, upright = (
            run_with_side_inputs(network, {**batch, "transform": matrix}).logits[0]
            for matrix in (batch["transform"], -batch["transform"])
        )
    assert not torch.allclose(moved, upright)


@pytest.mark.slow
def test_a_grid_follows_its_images_from_training_to_mirrored_prediction(scar_cohort, tmp_path):
    recipe = tiny_recipe(scar_cohort, "ecg_time")
    recipe = replace(recipe, network=replace(recipe.network, projection="grid", grid_side=2))
    recipe = replace(recipe, data=recipe.data.with_preprocessing(patches=Patches(mirror=True, samples_per_epoch=8)))
    report = train(recipe, tmp_path / "run").read_text()
    assert "| ECG's map | on a coarse grid (grid) |" in report
    assert not (tmp_path / "run" / "figures" / "ecg_bullseye.png").exists()
    assert TaffUNet.from_pretrained(tmp_path / "run" / "best").fusion.grid_side == 2
    predictions = tmp_path / "run" / "predictions" / "test"
    predict_images(tmp_path / "run", scar_cohort, tmp_path / "new")
    for case_id in ("case006", "case007"):
        again, first = (folder / f"{case_id}.nii.gz" for folder in (tmp_path / "new", predictions))
        assert again.read_bytes() == first.read_bytes()


def test_an_audit_takes_the_inputs_of_the_training(finished, tmp_path):
    """The prior of a run is found again; what is exchanged changes as in the report's exchange test."""
    report = (finished / "report.md").read_text()
    found = audit_run(finished, out=tmp_path / "out", device="cpu").audit
    assert {each.mechanism.name: each.cases for each in found.findings} == {
        "prior": 2,
        "prior of another case": 2,
        "ECG": 2,
        "ECG of another case": 2,
        "gate at 1/2": 2,
        "gate fixed": 2,
        "time": 2,
        "interval of another case": 2,
    }
    (spread,) = found.spreads
    assert spread.name == "gate weight of the ECG"
    assert re.search(r"## Exchange test: ECG of another case .* %.*; interval of another case .* %", report)
    with (finished / "figures" / "exchange_test.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    shares = {row["mechanism"]: float(row["changed"]) for row in rows if row["target"] == "all classes"}
    ours = {each.mechanism.name: each.moved[0].share.mean for each in found.findings}
    assert shares == {name: ours[name] for name in ("ECG of another case", "interval of another case")}


def test_new_images_bring_their_ecg_and_need_labels_for_an_oracle(finished, scar_cohort, tmp_path):
    with pytest.raises(DataError, match=r"--prior-labels(.|\n)*oracle prior"):
        predict_images(finished, scar_cohort, tmp_path / "labels")
    paths = predict_images(finished / "best", scar_cohort, tmp_path / "labels", prior_labels=scar_cohort / "seg")
    assert len(paths) == 7
    written = finished / "predictions" / "test" / "case007.nii.gz"
    assert (tmp_path / "labels" / "case007.nii.gz").read_bytes() == written.read_bytes()


def test_l9_a_case_whose_inputs_are_broken_does_not_stop_the_others(finished, scar_cohort, tmp_path, capsys):
    labels = shutil.copytree(scar_cohort / "seg", tmp_path / "seg")
    name = next(labels.glob("case003*")).name
    kept = (labels / name).read_bytes()
    (labels / name).write_bytes(kept[:200])
    out = tmp_path / "labels"
    with pytest.raises(DataError, match=rf"(?s)^case003: not predicted: got .*seg/{name}"):
        predict_images(finished, scar_cohort, out, prior_labels=labels)
    assert sorted(path.name for path in out.glob("*.nii.gz")) == [f"case00{n}.nii.gz" for n in (1, 2, 4, 5, 6, 7)]
    (labels / name).write_bytes(kept)
    capsys.readouterr()
    assert len(predict_images(finished, scar_cohort, out, prior_labels=labels)) == 7
    assert "6 label maps kept, of the same images\n" in capsys.readouterr().err
    before = (out / "case003.nii.gz").read_bytes()
    (labels / name).unlink()  # what was made of it before is neither lost nor believed
    with pytest.raises(DataError, match="case003: not predicted"):
        predict_images(finished, scar_cohort, out, prior_labels=labels)
    assert (out / "case003.nii.gz").read_bytes() == before
    assert read_record(out / "predictions.json")["images_sha256"].keys() == {f"case00{n}" for n in (1, 2, 4, 5, 6, 7)}


def test_the_loaded_network_is_the_one_that_was_trained(finished):
    network, data = load_network(finished)
    assert isinstance(network, TaffUNet)
    assert network.config.setting == "full"
    assert network.config.num_classes == 4
    assert data.preprocessing.image_size == 32


@pytest.mark.slow
def test_a_predicted_prior_from_its_first_pass_to_new_images(scar_cohort, tmp_path):
    recipe = tiny_recipe(scar_cohort, "ap", source="predicted", folds=2)
    report = train(recipe, tmp_path / "run").read_text()
    assert report.startswith("# TAFF-UNet (ap, predicted prior) on phantom")
    assert "oracle" not in report.split("## What the paper reports")[0]
    assert len(predict_images(tmp_path / "run", scar_cohort, tmp_path / "new")) == 7
    with pytest.raises(DataError, match="--reference orientation"):  # a file alone has no landmarks
        predict_images(tmp_path / "run", scar_cohort / "lge" / "case007.nii.gz", tmp_path / "one")
    assert (tmp_path / "new" / "first_pass" / "case007.nii.gz").exists()


@pytest.mark.slow
def test_seeds_reproduce(scar_cohort, tmp_path):
    recipe = tiny_recipe(scar_cohort, "ecg")
    cohort = open_cohort(scar_cohort)
    weights = []
    for seed, name in ((0, "first"), (1, "other"), (0, "again")):
        of_seed = replace(
            recipe, training=replace(recipe.training, seed=seed), network=replace(recipe.network, init_seed=seed)
        )
        train(of_seed, tmp_path / name, parts=("val",))
        weights.append(TaffUNet.from_pretrained(tmp_path / name / "best").state_dict())
    assert cohort.split.val
    first, other, again = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        first["encoder.stages.0.0.convs.0.conv.weight"], other["encoder.stages.0.0.convs.0.conv.weight"]
    )
