"""The first pass: nobody's prior comes from a network that has seen it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from trifuse.architectures.data.layouts.cohort import Split
from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.samples.preprocessing import Patches
from trifuse.architectures.data.volumes.nifti import read_image, write_image
from trifuse.architectures.runs.predict import load_network
from trifuse.architectures.storage.config_json import config_to_json
from trifuse.architectures.storage.record import read_record, write_record
from trifuse.architectures.taff_unet import first_pass as first_pass_file
from trifuse.architectures.taff_unet import train as taff_train
from trifuse.architectures.taff_unet.first_pass import first_pass, first_pass_splits, predict_first_pass
from trifuse.architectures.taff_unet.inputs import EcgInputRecipe, PriorRecipe
from trifuse.architectures.taff_unet.train import TaffUNetRecipe, prediction_side_inputs, training_side_inputs
from trifuse.architectures.training.run_folder import OutputFolderError
from trifuse.kernels import DataError


@pytest.fixture(scope="module")
def cohort(scar_cohort):
    return open_cohort(scar_cohort)


def tiny_recipe(root) -> TaffUNetRecipe:
    recipe = TaffUNetRecipe()
    patches = Patches(mirror=False, samples_per_epoch=8)
    data = replace(recipe.data, root=str(root)).with_preprocessing(image_size=32, patches=patches)
    network = replace(recipe.network, image_size=32, base_dim=4)
    training = replace(recipe.training, epochs=1, batch_size=4, device="cpu")
    return replace(recipe, data=data, network=network, training=training, prior=PriorRecipe("predicted", folds=2))


def test_no_case_is_predicted_by_a_network_that_has_seen_it(cohort):
    splits = list(first_pass_splits(cohort, cohort.split, 3, seed=0))
    assert [name for name, _, _ in splits] == ["fold_1", "fold_2", "fold_3", "network"]
    predicted = [case_id for _, _, some in splits for case_id in some]
    used = (*cohort.split.train, *cohort.split.val, *cohort.split.test)
    assert sorted(predicted) == sorted(used)  # each once
    for _, split, some in splits:
        assert not {*some} & {*split.train}
        assert not {*split.train} & {*cohort.split.test, *cohort.split.val}
        assert split.val == cohort.split.val  # chooses the best epoch of each
        assert {*split.train, *split.val, *split.test, *split.unused} == {case.case_id for case in cohort.cases}


def test_a_patient_is_in_one_fold(cohort):
    cases = tuple(replace(case, patient=f"patient{index // 2}") for index, case in enumerate(cohort.cases))
    for _, split, some in first_pass_splits(replace(cohort, cases=cases), cohort.split, 2, seed=1):
        of = {case.case_id: case.patient for case in cases}
        assert not {of[name] for name in split.train} & {of[name] for name in some if name in cohort.split.train}


def test_more_folds_than_patients_are_as_many_as_patients(cohort):
    few = Split(cohort.split.train[:2], cohort.split.val, cohort.split.test, cohort.split.train[2:])
    assert [name for name, _, _ in first_pass_splits(cohort, few, 5, 0)] == ["fold_1", "fold_2", "network"]


def test_it_trains_once_and_predicts_every_case_and_new_images(scar_cohort, cohort, tmp_path):
    recipe = tiny_recipe(scar_cohort)
    labels = first_pass(recipe, cohort, cohort.split, tmp_path)
    names = {f"{case.case_id}.nii.gz" for case in cohort.cases}
    assert {path.name for path in labels.iterdir()} == names
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert first_pass(recipe, cohort, cohort.split, tmp_path) == labels
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == written
    damaged = [labels / "case001.nii.gz", labels / "case002.nii.gz", *tmp_path.glob("**/predictions/case002.nii.gz")]
    assert len(damaged) == 3
    before = [path.read_bytes() for path in damaged]
    damaged[0].write_bytes(before[0][: len(before[0]) // 2])  # a copy that was cut short, and a byte that flipped
    for path, content in zip(damaged[1:], before[1:], strict=True):
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        path.write_bytes(flipped)
    first_pass(recipe, cohort, cohort.split, tmp_path)
    assert [path.read_bytes() for path in damaged] == before
    damaged[0].write_bytes(before[1])  # l16: whole, but not what the network wrote
    first_pass(recipe, cohort, cohort.split, tmp_path)
    assert damaged[0].read_bytes() == before[0] != before[1]

    image = cohort.case(cohort.split.test[0]).image
    stored, before = image.read_bytes(), written[labels / f"{cohort.split.test[0]}.nii.gz"]
    shown = read_image(image)
    write_image(image, shown.voxels + 1, like=shown)
    first_pass(recipe, cohort, cohort.split, tmp_path)  # an image that was replaced
    assert (labels / f"{cohort.split.test[0]}.nii.gz").stat().st_mtime_ns > before
    image.write_bytes(stored)

    network, data = load_network(tmp_path / "first_pass" / "network")
    assert network.architecture == "plain_unet"
    assert network.config.base_dim == 4
    assert data.preprocessing.patches.spacing_mm is not None

    some = replace(cohort, cases=cohort.cases[:1])
    with pytest.raises(DataError, match="memory that its prediction takes"):
        predict_first_pass(tmp_path, some, tmp_path / "new", recipe.prior, 4, max_ram=1)
    assert not (tmp_path / "new").exists()
    assert predict_first_pass(tmp_path, some, tmp_path / "new", recipe.prior, 4) == tmp_path / "new"
    assert (tmp_path / "new" / "case001.nii.gz").exists()
    (tmp_path / "half.nii.gz").write_bytes(some.cases[0].image.read_bytes()[:900])
    two = replace(cohort, cases=(replace(cohort.cases[1], image=tmp_path / "half.nii.gz"), cohort.cases[2]))
    broken: dict[str, DataError] = {}
    predict_first_pass(tmp_path, two, tmp_path / "two", recipe.prior, 4, broken=broken)  # l9: the others go on
    assert (broken.keys(), len([*(tmp_path / "two").glob("*.nii.gz")])) == ({"case002"}, 1)


def test_t14_a_first_pass_goes_on_under_another_recipe_where_that_is_forced(scar_cohort, cohort, tmp_path, monkeypatch):
    """That of a run which was stopped in it, here before it had predicted: its networks are the run's, too."""
    splits = list(first_pass_splits(cohort, cohort.split, 2, 0))[-1:]
    monkeypatch.setattr(first_pass_file, "first_pass_splits", lambda *_: splits)
    recipe = tiny_recipe(scar_cohort)
    labels = first_pass(recipe, cohort, cohort.split, tmp_path)
    for path in labels.iterdir():
        path.unlink()
    other = replace(recipe, training=replace(recipe.training, epochs=2, lr=0.02))
    with pytest.raises(OutputFolderError, match=r"recipe\.lr: 0\.01 -> 0\.02\n.*--force-resume"):
        first_pass(other, cohort, cohort.split, tmp_path)
    monkeypatch.setattr(taff_train, "case_side_inputs", lambda *_, labels, **__: labels)
    assert training_side_inputs(other, cohort, cohort.split, tmp_path, force_resume=True) == labels
    assert {path.name for path in labels.iterdir()} == {f"{case_id}.nii.gz" for case_id in splits[0][2]}
    assert read_record(tmp_path / "first_pass" / "network" / "run.json")["recipe"]["lr"] == 0.02


@pytest.mark.parametrize(("own", "epochs"), [(None, 7), (3, 3)])
def test_its_trainings_are_as_long_as_the_run_or_as_the_recipe_says(
    own, epochs, scar_cohort, cohort, tmp_path, monkeypatch
):
    class Asked(Exception):
        pass

    def ask(model, recipe, *rest, **options):
        raise Asked(recipe.training.epochs)

    monkeypatch.setattr("trifuse.architectures.taff_unet.first_pass.fit_network", ask)
    recipe = tiny_recipe(scar_cohort)
    recipe = replace(
        recipe,
        training=replace(recipe.training, epochs=7),
        prior=replace(recipe.prior, first_pass_epochs=own),
    )
    with pytest.raises(Asked, match=f"^{epochs}$"):
        first_pass(recipe, cohort, cohort.split, tmp_path)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (PriorRecipe("gt"), "trained with an oracle prior"),
        (PriorRecipe("predicted"), "no first pass to predict the wall by"),
    ],
)
def test_new_images_need_a_first_pass_or_labels(cohort, tmp_path, prior, message):
    with pytest.raises(DataError, match=rf"--prior-labels(.|\n)*{message}"):
        predict_first_pass(tmp_path, cohort, tmp_path / "new", prior, 4)


def test_new_images_bring_what_the_run_says_in_the_memory_that_is_granted(cohort, tmp_path, monkeypatch):
    asked = {}

    def find_the_wall(run, cohort, out, prior, batch_size, *, max_ram, broken):
        asked["first pass"] = run, prior, batch_size, max_ram
        return out

    def read(cohort, case_ids, network, prior, ecg, *, labels, broken):
        asked["inputs"] = prior, ecg, labels
        return {}

    monkeypatch.setattr(taff_train, "predict_first_pass", find_the_wall)
    monkeypatch.setattr(taff_train, "case_side_inputs", read)
    prior, ecg = PriorRecipe("predicted", reference="orientation"), EcgInputRecipe(min_beats=1)
    write_record(tmp_path / "run.json", {"config": {"prior": config_to_json(prior), "ecg": config_to_json(ecg)}})
    model, out = SimpleNamespace(config=TaffUNetRecipe().network), tmp_path / "out"
    prediction_side_inputs(model, tmp_path, cohort, out, prior_labels=None, batch_size=4, max_ram=1 << 30)
    found = out / "first_pass"
    assert asked == {"first pass": (tmp_path, prior, 4, 1 << 30), "inputs": (prior, ecg, found)}
