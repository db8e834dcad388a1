"""``trifuse compare``: several networks in one picture, and two in a test."""

from __future__ import annotations

from command import SCAR_TRAINING, run_main


def test_several_networks_in_one_picture(plain_run, scar_cohort, tmp_path, capsys):
    other = tmp_path / "baseline"
    words = ["train", "taff_unet", scar_cohort, "--setting", "baseline", "--out", other, *SCAR_TRAINING]
    assert run_main(words, capsys)[0] == 0
    code, output, _ = run_main(["compare", "--overlay", plain_run, other, "--out", tmp_path / "sheet"], capsys)
    assert code == 0
    assert (tmp_path / "sheet" / "model_overlays.png").exists()
    assert "model_overlays.png" in output
    assert run_main(["compare", plain_run, other], capsys)[0] == 0  # the paired test
    for wrong, message in (
        (["compare", plain_run], "expected two runs to compare"),
        (["compare", plain_run, other, plain_run], "expected two runs to compare"),
        (["compare", "--overlay", plain_run, other], "say with --out which folder"),
    ):
        code, _, errors = run_main(wrong, capsys)
        assert code == 2
        assert message in errors
