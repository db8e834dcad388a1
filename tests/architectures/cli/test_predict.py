"""``trifuse predict``: one file, a cohort, other values, and networks that nobody can run as asked."""

from __future__ import annotations

import json
import shutil
from argparse import ArgumentTypeError

import nibabel
import numpy as np
import pytest
from command import run_main
from safetensors.torch import load_file, save_file

from trifuse.architectures.cli.main import main
from trifuse.architectures.data.volumes.nifti import read_image, write_image
from trifuse.architectures.evaluation.tables import read_case_table
from trifuse.architectures.runs import predict
from trifuse.architectures.runs.options import memory_size
from trifuse.architectures.storage.atomic_files import sha256_of
from trifuse.architectures.storage.record import read_record, write_record
from trifuse.architectures.taff_unet import TaffUNet, TaffUNetConfig
from trifuse.architectures.taff_unet import train as taff_train


def test_one_file_is_predicted_as_well(atria_run, atria, tmp_path, capsys):
    image = atria / "train_data" / "train_4" / "enhanced.nii.gz"
    assert (
        run_main(["predict", atria_run / "best", image, "--out", tmp_path / "o", "--image-size", "56"], capsys)[0] == 0
    )
    assert [path.name for path in (tmp_path / "o").glob("*.nii.gz")] == ["enhanced.nii.gz"]


def test_a_window_that_is_none_is_refused_before_anything_is_opened(tmp_path, capsys):
    words = ["predict", tmp_path / "no_model", tmp_path / "no_images", "--out", tmp_path / "o", "--window", "5", "1"]
    code, _, errors = run_main(words, capsys)
    assert (code, "window: expected its lowest and highest value" in errors) == (2, True)


def test_c1_c7_c12_a_model_that_is_none(tmp_path, atria, capsys):
    image = atria / "train_data" / "train_4" / "enhanced.nii.gz"
    code, _, errors = run_main(["predict", tmp_path, image, "--out", tmp_path / "o"], capsys)
    assert code == 4
    assert "config.json" in errors
    config = {"format": "trifuse", "schema_version": 1, "config": {}, "sha256": {}}
    for architecture in ({"architecture": "unet9000"}, {}, {"architecture": []}):
        (tmp_path / "config.json").write_text(json.dumps(config | architecture))
        code, _, errors = run_main(["predict", tmp_path, image, "--out", tmp_path / "o"], capsys)
        assert code == 4
        assert f"unknown architecture {architecture.get('architecture')!r}; known are dino_unet, " in errors


def test_c1_a_file_of_weights_is_no_model(tmp_path, atria, capsys):
    (tmp_path / "weights.pth").write_bytes(b"anything")
    image = atria / "train_data" / "train_4" / "enhanced.nii.gz"
    code, _, errors = run_main(["predict", tmp_path / "weights.pth", image, "--out", tmp_path / "o"], capsys)
    assert code == 4
    assert "expected a folder with config.json and model.safetensors, got a file" in errors
    assert "trifuse convert" in errors


def test_c10_weights_of_half_precision_are_converted_and_a_note_says_so(atria_run, atria, tmp_path, capsys):
    folder = shutil.copytree(atria_run / "best", tmp_path / "best")
    weights = folder / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    write_record(
        folder / "config.json",
        read_record(folder / "config.json") | {"sha256": {"model.safetensors": sha256_of(weights)}},
    )
    image = atria / "train_data" / "train_4" / "enhanced.nii.gz"
    words = ["predict", folder, image, "--out", tmp_path / "o", "--image-size", "28"]
    code, _, said = run_main(words, capsys)
    assert code == 0
    assert f"note: {weights}: " in said
    assert "stored as torch.float16, converted to torch.float32\n" in said
    assert "Warning" not in said


def test_d20_a_frame_of_an_image_of_four_dimensions_is_chosen(atria_run, atria, tmp_path, capsys):
    still = nibabel.load(atria / "train_data" / "train_4" / "enhanced.nii.gz")
    voxels = np.asarray(still.dataobj)
    for name, array in (("cine", np.stack([voxels[::-1], voxels], axis=-1)), ("still", voxels)):
        nibabel.save(nibabel.Nifti1Image(array, still.affine), tmp_path / f"{name}.nii.gz")
    words = ["predict", atria_run, "--image-size", "28", "--out", tmp_path / "o", tmp_path / "cine.nii.gz"]
    code, _, errors = run_main(words, capsys)
    assert code == 3
    assert "choose one of its 2 frames, --frame 0 to --frame 1, or write it to a file of its own" in errors
    code, _, errors = run_main([*words, "--frame", "2"], capsys)
    assert code == 3
    assert "cine.nii.gz: --frame: expected 0 to 1 for a file of shape" in errors
    assert run_main([*words, "--frame", "0"], capsys)[0] == 0
    code, _, said = run_main([*words, "--frame", "1"], capsys)
    assert (code, "1 label map made anew" in said) == (0, True)
    assert run_main([*words[:-1], tmp_path / "still.nii.gz"], capsys)[0] == 0
    assert (tmp_path / "o" / "cine.nii.gz").read_bytes() == (tmp_path / "o" / "still.nii.gz").read_bytes()


def test_l7_a_gpu_that_is_not_there(atria_run, atria, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    image = atria / "train_data" / "train_4" / "enhanced.nii.gz"
    code, _, errors = run_main(["predict", atria_run, image, "--out", tmp_path / "o", "--device", "cuda"], capsys)
    assert code == 2
    assert "device 'cuda' needs GPU number 0; found 0 GPUs; use device 'cpu'" in errors
    assert not (tmp_path / "o").exists()


def test_l8_no_image_in_a_folder(atria_run, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    code, _, errors = run_main(["predict", atria_run, tmp_path / "images", "--out", tmp_path / "o"], capsys)
    assert code == 3
    assert "*.nii" in errors
    assert not (tmp_path / "o").exists()


def test_l9_a_broken_image_is_listed_and_the_next_call_predicts_it_alone(atria_run, atria, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "o"
    images.mkdir()
    for number in (1, 2, 3):
        shutil.copy(atria / "train_data" / f"train_{number}" / "enhanced.nii.gz", images / f"case_{number}.nii.gz")
    whole = (images / "case_2.nii.gz").read_bytes()
    (images / "case_2.nii.gz").write_bytes(whole[: len(whole) // 2])
    words = ["predict", atria_run, images, "--out", out, "--image-size", "28"]
    code, _, errors = run_main(words, capsys)
    assert code == 3
    assert ("case_2: not predicted" in errors, "case_1: " in errors, "case_3: " in errors) == (True, False, False)
    assert sorted(path.name for path in out.glob("*.nii.gz")) == ["case_1.nii.gz", "case_3.nii.gz"]
    (images / "case_2.nii.gz").write_bytes(whole)
    code, _, errors = run_main(words, capsys)
    assert (code, "2 label maps kept" in errors, (out / "case_2.nii.gz").exists()) == (0, True, True)


@pytest.mark.parametrize("address", ["https://huggingface.co/x/y", "x/../../y", "x/y", "file:///etc/passwd"])
def test_c18_an_address_is_no_model(address, atria, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *arguments: pytest.fail("something is fetched"))
    image = atria / "train_data" / "train_4" / "enhanced.nii.gz"
    code, _, errors = run_main(["predict", address, image, "--out", tmp_path / "o"], capsys)
    assert code == 4
    assert "not found; expected a folder with config.json and model.safetensors" in errors


def test_c16_weights_in_several_files_are_no_model(atria_run, atria, tmp_path, capsys):
    folder = shutil.copytree(atria_run / "best", tmp_path / "best")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weights = dict.fromkeys(("a", "b"), "../../secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    image = atria / "train_data" / "train_4" / "enhanced.nii.gz"
    code, _, errors = run_main(["predict", folder, image, "--out", tmp_path / "o"], capsys)
    assert code == 4
    assert "model.safetensors: expected a safetensors file, found nothing" in errors


def test_the_best_network_of_a_run_prepares_slices_as_the_run_did(abdomen_run, abdomen, tmp_path, capsys):
    for folder in ("run", "best"):
        model = abdomen_run / "best" if folder == "best" else abdomen_run
        assert run_main(["predict", model, abdomen, "--out", tmp_path / folder], capsys)[0] == 0
    for path in (tmp_path / "run").iterdir():
        assert path.read_bytes() == (tmp_path / "best" / path.name).read_bytes()


def test_a_window_brings_other_images_to_the_values_of_the_training(abdomen_run, abdomen, tmp_path, capsys):
    """Of Synapse's values, 0 to 1, and of the same in Hounsfield units, written as NIfTI."""
    words = ["data", "convert", abdomen, "--label-space", "transunet9", "--to", "nnunet", "--out", tmp_path / "raw"]
    assert run_main(words, capsys)[0] == 0
    for path in (tmp_path / "raw").glob("images*/*"):
        image = read_image(path)
        write_image(path, image.voxels * 400 - 125, like=image)
    (test,) = (abdomen_run / "predictions" / "test").glob("*.nii.gz")
    for options in ((), ("--window", "-125", "275")):
        out = tmp_path / f"labels{len(options)}"
        code, _, errors = run_main(["predict", abdomen_run, tmp_path / "raw", "--out", out, *options], capsys)
        assert (code, "pass --window -125 275" in errors) == (0, not options)
        used = json.loads((out / "predictions.json").read_text())["preprocessing"]
        assert (used["intensity"], used["window"]) == (("window", [-125, 275]) if options else ("as_is", None))
    assert (nibabel.load(out / test.name).get_fdata() == nibabel.load(test).get_fdata()).mean() > 0.99
    words = ["predict", abdomen_run, tmp_path / "raw", "--out", tmp_path / "x", "--window", "3", "1"]
    code, _, errors = run_main(words, capsys)
    assert (code, "window: expected its lowest and highest value" in errors) == (2, True)


@pytest.mark.parametrize("device", ["gpu", "cuda:first", "cpu:0"])
def test_devices_that_there_are_none_of(device, abdomen_run, abdomen, tmp_path, capsys):
    code, _, errors = run_main(["predict", abdomen_run, abdomen, "--out", tmp_path / "x", "--device", device], capsys)
    assert (code, f"unknown device '{device}'; use one of auto, cpu, cuda and cuda:<index>" in errors) == (2, True)


@pytest.mark.parametrize("option", ["--batch-size", "--image-size"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5"])
def test_what_is_counted_is_at_least_one(option, value, abdomen_run, abdomen, tmp_path, capsys):
    code, _, errors = run_main(["predict", abdomen_run, abdomen, "--out", tmp_path / "x", option, value], capsys)
    assert (code, f"{option}: expected a whole number of at least 1, got '{value}'" in errors) == (2, True)


def test_plain_unet_from_a_cohort_to_a_report_and_to_new_images(plain_run, scar_cohort, tmp_path, capsys):
    assert (plain_run / "report.md").read_text().startswith("# ")
    run = json.loads((plain_run / "run.json").read_text())["config"]
    assert run["network"]["image_size"] == run["data"]["preprocessing"]["image_size"] == 32
    assert {row.class_name for row in read_case_table(plain_run / "test_cases.csv")} >= {"scar", "blood pool"}
    network = shutil.copytree(plain_run / "best", tmp_path / "network")  # as a converted one: nobody knows its spacing
    words = ["predict", network, scar_cohort, "--out", tmp_path / "labels"]
    code, _, errors = run_main(words, capsys)
    assert code == 4
    assert "--spacing 1.25 1.25" in errors
    spacing = run["data"]["preprocessing"]["patches"]["spacing_mm"]
    assert run_main([*words, "--spacing", *spacing], capsys)[0] == 0
    assert len(list((tmp_path / "labels").glob("*.nii.gz"))) == 7
    code, _, errors = run_main(["predict", plain_run, scar_cohort, "--out", tmp_path / "x", "--spacing", 1, 1], capsys)
    assert code == 4
    assert "leave the spacing to it" in errors


def test_memory_that_is_granted_is_enough_or_nothing_is_predicted(atria_run, atria, tmp_path, capsys):
    image = atria / "train_data" / "train_4" / "enhanced.nii.gz"
    words = ["predict", atria_run / "best", image, "--out", tmp_path / "o", "--image-size", "28", "--max-ram"]
    code, _, said = run_main([*words, "20M"], capsys)
    assert code == 3
    assert f"{image}: memory that its prediction takes: expected at most 0.01 GiB (--max-ram), got " in said
    assert "grant that much, or leave the case out" in said
    assert not (tmp_path / "o").exists()
    assert run_main([*words, "90G"], capsys)[0] == 0
    assert (tmp_path / "o" / "enhanced.nii.gz").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("4G", 4 << 30), ("4GiB", 4 << 30), ("500m", 500 << 20), ("1.5k", 1536), ("12", 12), ("2 TiB", 2 << 40)],
)
def test_an_amount_of_memory_is_read(text, size):
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "0", "-1G", "4GB", "4 X", "1e9", "inf", "٣G", "0.0001", "9" * 400])
def test_l2_what_is_no_amount_of_memory(text):
    with pytest.raises(ArgumentTypeError, match="expected an amount of memory such as 4G"):
        memory_size(text)


def test_prior_labels_are_for_networks_with_a_prior(plain_run, scar_cohort, tmp_path, capsys):
    words = ["predict", plain_run, scar_cohort, "--out", tmp_path / "labels", "--prior-labels", scar_cohort / "seg"]
    code, _, errors = run_main(words, capsys)
    assert code == 3
    assert "expected a network that takes a prior, got plain_unet" in errors


@pytest.mark.parametrize("spacing", [(-1, 1), (0, 1), ("nan", 1), (1e9, 1)])
def test_l2_a_spacing_that_is_no_length(plain_run, scar_cohort, tmp_path, capsys, spacing):
    network = shutil.copytree(plain_run / "best", tmp_path / "network")
    words = ["predict", network, scar_cohort, "--out", tmp_path / "x", "--spacing", *spacing]
    code, _, errors = run_main(words, capsys)
    assert (code, "spacing_mm must be" in errors) == (2, True)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 5000, '{"config": 3}'])
def test_l3_a_run_whose_description_is_broken(plain_run, scar_cohort, tmp_path, capsys, content):
    run = shutil.copytree(plain_run, tmp_path / "run")
    (run / "run.json").write_text(content)
    code, _, errors = run_main(["predict", run, scar_cohort, "--out", tmp_path / "x"], capsys)
    assert (code, "run.json: " in errors) == (4, True)


def test_options_of_a_prediction_reach_what_they_are_for(atria, tmp_path, monkeypatch):
    """Memory that is granted decides the batches, and holds for what finds the wall, too."""
    TaffUNet(TaffUNetConfig("full", image_size=32, base_dim=4)).save_pretrained(tmp_path / "model")
    image, asked = atria / "train_data" / "train_4" / "enhanced.nii.gz", {}

    def sizes(max_ram, model, cases, preprocessing, batch_size, inputs):
        asked["sizes"] = max_ram, batch_size, preprocessing.image_size, inputs["prior"]
        return {case.case_id: 2 for case in cases}

    def side_inputs(model, run, cohort, out, *, prior_labels, batch_size, max_ram):
        asked["side inputs"] = max_ram, batch_size, prior_labels, cohort.cases[0].frame
        return {}

    def cases(model, cohort, case_ids, out, preprocessing, *, side_inputs, batch_size):
        asked["cases"] = batch_size, preprocessing.nonfinite, preprocessing.image_size, preprocessing.patches.spacing_mm
        return []

    monkeypatch.setattr(predict, "batch_sizes_within", sizes)
    monkeypatch.setattr(predict, "predict_cases", cases)
    monkeypatch.setattr(taff_train, "prediction_side_inputs", side_inputs)
    options = {"--spacing": "1 2", "--batch-size": "5", "--max-ram": "9K", "--nonfinite": "median", "--frame": "3"}
    options |= {"--image-size": "64", "--prior-labels": str(tmp_path)}
    words = [word for name, values in options.items() for word in (name, *values.split())]
    assert main(["predict", str(tmp_path / "model"), str(image), "--out", str(tmp_path / "out"), *words]) == 0
    assert asked == {
        "sizes": (9 << 10, 5, 64, (17, 64, 64)),
        "side inputs": (9 << 10, 5, tmp_path, 3),
        "cases": ({"enhanced": 2}, "median", 64, (1.0, 2.0)),
    }
