"""``trifuse convert``: published weights, and a training that starts from them."""

from __future__ import annotations

import io
import tarfile
import zipfile

import pytest
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
    assert run_main([*train, "--encoder", tmp_path / "encoder"], capsys)[0] == 0
    trained = DinoUNet.from_pretrained(tmp_path / "run" / "best").encoder
    for name, value in encoder.state_dict().items():
        assert (trained.state_dict()[name] == value).all(), name
    assert "weights of encoder, frozen" in (tmp_path / "run" / "report.md").read_text()
    code, _, errors = run_main([*train[:4], tmp_path / "x", "--encoder", tmp_path / "nowhere"], capsys)
    assert code == 4
    assert "nowhere: not found" in errors


@pytest.mark.parametrize("kind", ["zip", "tar", "links", "bomb"])
@pytest.mark.parametrize("converter", ["dinov2", "nnunet"])
def test_c19_an_archive_is_not_unpacked(kind, converter, tmp_path, capsys):
    inner = tmp_path / "inner"
    inner.mkdir()
    path = inner / "weights.pth"
    if kind in ("zip", "bomb"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("../escaped", b"x" if kind == "zip" else bytes(1 << 20))
            archive.writestr("archive/data.pkl", b"x" if kind == "zip" else bytes(1 << 26))
    else:
        with tarfile.open(path, "w") as archive:
            member = tarfile.TarInfo("../escaped")
            if kind == "links":
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(member, io.BytesIO(b""))
    code, _, errors = run_main(["convert", converter, path, "--out", inner / "out"], capsys)
    assert code == 4
    assert f"{path}: expected tensors saved by PyTorch" in errors
    assert [file.name for file in tmp_path.rglob("*")] == ["inner", "weights.pth"]


def test_l4_only_a_conversion_is_replaced(tmp_path, capsys):
    """Weights of others, and the network of a run, were replaced, the former even unasked."""
    from safetensors.torch import save_file

    from trifuse.architectures.dino_unet import DinoV2Encoder, dino_unet_tiny

    save_file(DinoV2Encoder("tiny", num_registers=4).state_dict(), tmp_path / "published.safetensors")
    words = ["convert", "dinov2", tmp_path / "published.safetensors", "--out"]
    dino_unet_tiny(num_classes=2).save_pretrained(tmp_path / "best")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"years of work")
    for folder in ("best", "mine"):
        before = (tmp_path / folder / "model.safetensors").read_bytes()
        for further in ([], ["--overwrite"]):
            code, _, errors = run_main([*words, tmp_path / folder, *further], capsys)
            assert (code, "exists already" in errors) == (2, True)
            assert ("replaces an earlier conversion alone" in errors) == bool(further)
        assert (tmp_path / folder / "model.safetensors").read_bytes() == before
    for further in ([], ["--overwrite"]):
        assert run_main([*words, tmp_path / "encoder", *further], capsys)[0] == 0
