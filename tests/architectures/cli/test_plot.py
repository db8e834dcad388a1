"""``trifuse plot``: an ECG, and the heart's segments."""

from __future__ import annotations

from command import run_main

from trifuse.architectures.cli.plot import REFERENCES
from trifuse.architectures.taff_unet.aha17_angles import Reference


def test_references_are_those_of_the_atlas():
    assert set(REFERENCES) == set(Reference.__args__)


def test_pictures_of_an_ecg_and_of_the_heart(scar_cohort, tmp_path, capsys):
    code, output, _ = run_main(["plot", "ecg", scar_cohort / "ecg" / "case003.npz", "--out", tmp_path], capsys)
    assert code == 0
    assert (tmp_path / "case003.png").exists()
    truth = scar_cohort / "seg" / "case001.nii.gz"
    words = ["plot", "bullseye", truth, truth, "--reference", "orientation", "--out", tmp_path]
    code, output, _ = run_main(words, capsys)
    assert code == 0
    assert (tmp_path / "bullseye.png").exists()
    assert "note: " in output
    words = ["plot", "bullseye", truth, "--reference", "fixed_angle", "--angle", 30, "--of", "wall", "--out", tmp_path]
    assert run_main(words, capsys)[0] == 0
    assert run_main(["plot", "bullseye", truth, "--out", tmp_path], capsys)[0] == 2
