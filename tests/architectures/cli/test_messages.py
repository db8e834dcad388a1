"""Errors of the command speak of its options, not of Python's arguments; what is said of many files is said once."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command import run_main

from trifuse.architectures.cli.arguments import commands_below, in_words_of
from trifuse.architectures.cli.main import build_parser
from trifuse.kernels import DataError

COMMANDS = {parser.prog: parser for parser in commands_below(build_parser())}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('read it with nonfinite="zero" or nonfinite="median"', "read it with --nonfinite zero or --nonfinite median"),
        ("choose it with channel=NAME", "choose it with --channel NAME"),
        ("targets='left kidney=3'", "--target 'left kidney=3'"),
        (
            "pass the label_space or max_interval_days",
            "pass the --label-space or --max-interval",
        ),
        ("accept_spacing=True if it is right, or correct it", "--accept-spacing if it is right, or correct it"),
        ("label_space", "--label-space"),
        ("channel", "--channel"),
        ("a channel of the image", "a channel of the image"),
        ("/data/label_space/x_targets and my.label_space", "/data/label_space/x_targets and my.label_space"),
        ("expected test_cases.csv, as of test_cases", "expected test_cases.csv, as of --test-cases"),
        ("cohort", "cohort"),  # of other commands
        ("frame=0 chooses, base_first=False not", "--frame 0 chooses, base_first=False not"),
    ],
)
def test_l20_arguments_become_options(text, words):
    assert in_words_of(COMMANDS["trifuse data check"], *COMMANDS.values())(text) == words


def test_l20_only_what_is_wanted_and_advised_is_put_in_other_words():
    error = DataError("a/channel=1.nii", "channel", got="channel=1", want="channel=2", hint="pass label_space")
    merged = DataError.merge([error, DataError("b", "not predicted", got=error)])
    reword = in_words_of(COMMANDS["trifuse data check"], *COMMANDS.values())
    said = "a/channel=1.nii: --channel: expected --channel 2, got channel=1; pass --label-space"
    assert error.told(reword) == said
    assert merged.told(reword) == f"2 problems in the data\n  - {said}\n  - b: not predicted: got {said}"
    assert str(error) == error.told() == "a/channel=1.nii: channel: expected channel=2, got channel=1; pass label_space"
    assert str(merged).count("\n") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data", "check"], "choose it with --channel NAME"),
        (
            ["data", "check", "--channel", "CT", "--frames", "ed"],
            "--frames: expected none: it belongs to the acdc",
        ),
        (["data", "check", "--channel", "CT", "--max-interval", "3"], "--max-interval: expected none"),
        (["data", "check", "--channel", "CT", "--patient", "("], "--patient: expected a regular expression"),
        (["data", "check", "--channel", "CT"], "can be read with --nonfinite zero or --nonfinite median"),
        (
            ["data", "convert", "--channel", "CT", "--to", "synapse", "--out", "x"],
            "the labels: --target 'left kidney=3'",
        ),
    ],
)
def test_l2_l20_errors_name_options(words, said, tmp_path, put_case, capsys):
    (tmp_path / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "CT", "1": "PET"},
                "labels": {"background": 0, "target": 1},
                "numTraining": 1,
                "file_ending": ".nii.gz",
            }
        )
    )
    put_case("c")
    for source, copies in (("images", ["imagesTr/c_0000", "imagesTr/c_0001"]), ("labels", ["labelsTr/c"])):
        for copy in copies:
            (tmp_path / copy).parent.mkdir(exist_ok=True)
            (tmp_path / f"{copy}.nii.gz").write_bytes((tmp_path / source / "c.nii.gz").read_bytes())
    if "nonfinite" in said:
        _put_nan(tmp_path / "imagesTr" / "c_0000.nii.gz")
    code, out, err = run_main([*words[:2], tmp_path, *words[2:]], capsys)
    assert code == 3
    assert said in out + err


def _put_nan(path):
    from trifuse.architectures.data.volumes.nifti import read_image, write_image

    image = read_image(path)
    voxels = image.voxels.copy()
    voxels[0, 0, 0] = np.nan
    write_image(path, voxels, like=image)


def test_l19_warnings_of_many_files_are_said_once(tmp_path, put_case, capsys):
    for number in range(12):
        put_case(f"c{number}", affine=np.diag([-1.0, -1.0, 300.0, 1.0]))
    code, out, _ = run_main(["data", "check", tmp_path], capsys)
    (warning,) = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert "lies outside 0.01 to 100.0 mm: wrong unit?: 24 files: images/c0.nii.gz, labels/c0.nii.gz, " in warning
    assert warning.endswith("labels/c4.nii.gz and 14 more")
    assert (code, out.splitlines()[-1]) == (0, "0 errors, 1 warning")
    assert run_main(["data", "check", tmp_path, "--strict"], capsys)[0] == 3


def test_a_warning_of_one_file_stays_with_its_file(tmp_path, put_case, capsys):
    put_case("a", affine=np.diag([-1.0, -1.0, 300.0, 1.0]), labels=None)
    put_case("b", labels=None)
    _, out, _ = run_main(["data", "check", tmp_path], capsys)
    assert f"warning: {tmp_path}/images/a.nii.gz: spacing: " in out
