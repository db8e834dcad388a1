"""``trifuse plot``: training curves, an ECG, and the heart's segments."""

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


def test_curves_of_a_run_and_of_a_log_alone(plain_run, tmp_path, capsys):
    code, output, _ = run_main(["plot", "curves", plain_run, "--out", tmp_path / "run"], capsys)
    assert (code, output) == (0, f"picture: {tmp_path / 'run' / 'curves.png'}\n")
    drawn = (tmp_path / "run" / "curves.csv").read_bytes()
    assert drawn == (plain_run / "figures" / "curves.csv").read_bytes()
    assert (tmp_path / "run" / "curves.png").read_bytes() == (plain_run / "figures" / "curves.png").read_bytes()
    (tmp_path / "copied").mkdir()
    (tmp_path / "copied" / "mine.csv").write_bytes((plain_run / "log.csv").read_bytes())
    words = ["plot", "curves", tmp_path / "copied" / "mine.csv", "--out", tmp_path / "log"]
    assert run_main(words, capsys)[0] == 0
    assert (tmp_path / "log" / "curves.csv").read_bytes() == drawn
    code, _, errors = run_main(["plot", "curves", tmp_path / "gone", "--out", tmp_path / "x"], capsys)
    assert (code, "gone" in errors, (tmp_path / "x").exists()) == (3, True, False)


def test_l4_l5_a_picture_s_table_replaces_no_record_and_no_other_table(scar_cohort, tmp_path, capsys):
    ecg, truth = scar_cohort / "ecg" / "case003.npz", scar_cohort / "seg" / "case001.nii.gz"
    heart = ["plot", "bullseye", truth, "--reference", "orientation", "--out", tmp_path]
    for words, name in ((["plot", "ecg", ecg, "--out", tmp_path], "case003.csv"), (heart, "bullseye.csv")):
        (tmp_path / name).write_text("somebody's own")
        code, _, errors = run_main(words, capsys)
        assert (code, (tmp_path / name).read_text()) == (2, "somebody's own")
        assert f"{name} is not the table of an earlier picture, and would be replaced; choose another --out" in errors
        (tmp_path / name).unlink()
        png = (tmp_path / name).with_suffix(".png")
        png.write_bytes(b"\x89PNG\r\n\x1a\nsomebody's own")
        code, _, errors = run_main(words, capsys)
        assert (code, png.read_bytes()[8:]) == (2, b"somebody's own")
        assert f"{png} is not an earlier picture, and would be replaced; choose another --out" in errors
        png.unlink()
        for _ in range(2):  # a picture's own table is replaced
            assert run_main(words, capsys)[0] == 0
    drawn = (tmp_path / "case003.csv").read_bytes()
    code, _, errors = run_main(["plot", "ecg", tmp_path / "case003.csv", "--out", tmp_path], capsys)
    assert (code, (tmp_path / "case003.csv").read_bytes()) == (2, drawn)
