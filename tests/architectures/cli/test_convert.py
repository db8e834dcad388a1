"""``trifuse convert``: published weights, and a training that starts from them."""

from __future__ import annotations

from command import ATRIA_TRAINING, run_main


def test_converted_weights_bring_their_own_shape(atria, tmp_path, capsys):
    from safetensors.torch import save_file

    from trifuse.architectures.dino_unet import DinoUNet, DinoV2Encoder

    encoder = DinoV2Encoder("tiny", num_registers=4, pos_mode="antialias")
    save_file(encoder.state_dict(), tmp_path / "published.safetensors")
    words = ["convert", "dinov2", tmp_path / "published.safetensors"]
    assert run_main(words, capsys)[0] == 0
    assert (tmp_path / "published" / "model.safetensors").exists()
    words += ["--out", tmp_path / "encoder"]
    code, output, _ = run_main(words, capsys)
    assert code == 0
    assert "DinoV2Encoder('tiny', num_registers=4, pos_mode='antialias')" in output
    code, _, errors = run_main(words, capsys)
    assert code == 2
    assert "exists already" in errors

    train = [
        "train",
        "dino_unet",
        atria,
        "--out",
        tmp_path / "run",
        "--split",
        atria / "split.json",
        *ATRIA_TRAINING[2:],
    ]
    assert run_main([*train, "--encoder", tmp_path / "encoder", "--epochs", "1"], capsys)[0] == 0
    trained = DinoUNet.from_pretrained(tmp_path / "run" / "best").encoder
    for name, value in encoder.state_dict().items():
        assert (trained.state_dict()[name] == value).all(), name
    assert "weights of encoder, frozen" in (tmp_path / "run" / "report.md").read_text()
    code, _, errors = run_main([*train[:4], tmp_path / "x", "--encoder", tmp_path / "nowhere"], capsys)
    assert code == 4
    assert "nowhere: not found" in errors
