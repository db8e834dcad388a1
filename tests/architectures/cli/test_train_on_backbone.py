"""``trifuse train dino_unet --encoder`` with the folder of a Hugging Face model."""

from __future__ import annotations

from command import ATRIA_TRAINING, run_main
from hugging_face import save_small_model


def test_the_command_trains_on_such_an_encoder(atria, tmp_path, capsys):
    save_small_model(tmp_path / "vit", "vit")
    at = ATRIA_TRAINING.index("--variant")
    training = [*ATRIA_TRAINING[:at], *ATRIA_TRAINING[at + 2 :]]
    words = ["train", "dino_unet", atria, "--out", tmp_path / "run", "--split", atria / "split.json", *training]
    code, _, errors = run_main([*words, "--encoder", tmp_path / "vit", "--cache-features"], capsys)
    assert code == 0, errors
    report = (tmp_path / "run" / "report.md").read_text()
    assert report.startswith("# DINO-UNet (vit, 4 blocks) on cohort")
    assert "| Encoder | vit, 4 blocks, weights of vit, frozen |" in report
