"""``trifuse probe`` from a folder of weights and a cohort to a picture and a table, and what it refuses."""

from __future__ import annotations

import csv

from command import run_main
from hugging_face import save_small_model


def words_of(encoder, cohort, out):
    split = ["--split", cohort / "split.json", "--image-size", "40", "--device", "cpu"]
    return ["probe", encoder, cohort, "--out", out, *split, "--seeds", "2", "--steps", "5", "--width", "4"]


def test_one_command_leads_to_a_picture_and_a_table(atria, tmp_path, capsys):
    save_small_model(tmp_path / "vit", "vit")
    words = words_of(tmp_path / "vit", atria, tmp_path / "out")
    code, output, errors = run_main(words, capsys)
    assert code == 0, errors
    before, _, after = output.partition("Of 4 blocks, block ")
    assert "slices, 4 blocks: features take about" in before
    assert f"GB in {tmp_path / 'out' / 'cache'}" in before
    assert "10 best" not in after
    rows = list(csv.DictReader((tmp_path / "out" / "block_probe.csv").open()))
    assert [row["k"] for row in rows] == ["1", "2", "3", "4"]
    assert abs(sum(float(row["weight"]) for row in rows) - 1) < 1e-5
    png = (tmp_path / "out" / "block_probe.png").read_bytes()
    assert run_main(words, capsys)[0] == 0
    assert (tmp_path / "out" / "block_probe.png").read_bytes() == png, "the same again, from the features that are kept"


def test_what_cannot_be_probed_is_refused_before_work_starts(atria, tmp_path, capsys):
    code, _, errors = run_main(words_of(tmp_path / "nowhere", atria, tmp_path / "out"), capsys)
    assert code == 4
    assert "nowhere: not found; expected a folder with config.json" in errors
    assert not (tmp_path / "out").exists()
    save_small_model(tmp_path / "vit", "vit")
    (tmp_path / "split.json").write_text('{"train": ["train_1", "train_2", "train_3"], "val": [], "test": ["train_4"]}')
    words = words_of(tmp_path / "vit", atria, tmp_path / "out")
    words[words.index("--split") + 1] = tmp_path / "split.json"
    code, _, errors = run_main(words, capsys)
    assert code == 3
    assert "expected at least one, got none; name some with --val-cases or --val-patients" in errors


def test_l4_a_picture_of_somebody_else_is_not_replaced(atria, tmp_path, capsys):
    (tmp_path / "block_probe.png").write_bytes(b"mine")
    code, _, errors = run_main(words_of(tmp_path / "vit", atria, tmp_path), capsys)
    assert code == 2
    assert "block_probe.png is not an earlier picture, and would be replaced" in errors
    assert (tmp_path / "block_probe.png").read_bytes() == b"mine"
