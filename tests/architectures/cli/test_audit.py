"""``trifuse audit``: a page, a chart and tables in the run; every mistake is met by what was expected, and a remedy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from command import run_main

from trifuse.architectures.dino_unet.model import DinoUNet
from trifuse.architectures.runs.audit import audit_run
from trifuse.architectures.storage.record import read_record, write_record
from trifuse.kernels import CheckpointError


@pytest.fixture
def balanced_run(atria_run, tmp_path) -> Path:
    """Return a run whose network finds as much target as background: a training of seconds finds none."""
    run = shutil.copytree(atria_run, tmp_path / "run", ignore=shutil.ignore_patterns("audit"))
    model = DinoUNet.from_pretrained(run / "best").eval()
    with torch.no_grad():
        background, target = model(torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))).unbind(1)
        model.decoder.head.bias[1] += (background - target).mean()
    shutil.rmtree(run / "best")
    model.save_pretrained(run / "best")
    return run


def test_an_audit_lies_in_the_run_and_is_replaced_on_demand_alone(balanced_run, capsys):
    code, output, errors = run_main(["audit", balanced_run], capsys)
    assert code == 0, errors
    page = balanced_run / "audit" / "test" / "audit.md"
    assert f"report:  {page}" in output
    for said in ("image branch", "skip of stage 4", "not measured, because all 4 blocks are selected", "alive"):
        assert said in output, said
    text = page.read_text()
    assert text.startswith("# Audit of run, dino_unet\n")
    for said in ("all 4 blocks are selected", "trifuse audit run", "| Cases | 1 test case: train_4 |"):
        assert said in text, said
    for name in ("audit.png", "audit.csv", "audit_cases.csv"):
        assert (page.parent / name).exists(), name
        assert f"({name})" in text
    before = page.read_bytes()
    code, _, errors = run_main(["audit", balanced_run, "--hd95"], capsys)
    assert (code, page.read_bytes()) == (2, before)
    assert "expected a new or an empty folder, got an earlier audit; choose another with --out" in errors
    for name in ("audit_watched.csv", "my_notes.txt"):
        (page.parent / name).write_text("of an audit before, or of somebody else")
    assert run_main(["audit", balanced_run, "--hd95", "--overwrite"], capsys)[0] == 0
    assert not (page.parent / "audit_watched.csv").exists(), "this network has nothing to watch"
    assert (page.parent / "my_notes.txt").exists(), "no audit wrote it"
    assert "HD95, mm, change" in page.read_text()


def test_patterns_and_parts_choose_the_cases(atria_run, tmp_path, capsys):
    words = ["audit", atria_run / "best", "--split", "train", "--out", tmp_path / "out"]
    assert run_main([*words, "--cases", "train_1", "--threshold", "0.5"], capsys)[0] == 0
    text = (tmp_path / "out" / "audit.md").read_text()
    assert "| Cases | 1 train case: train_1 |" in text
    assert "less than 50 %" in text
    code, _, errors = run_main([*words[:-1], tmp_path / "other", "--cases", "train_9"], capsys)
    assert code == 3
    assert "0 cases that match 'train_9'" in errors
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_fias_is_audited_class_by_class(abdomen_run, tmp_path, capsys):
    assert run_main(["audit", abdomen_run, "--out", tmp_path / "out"], capsys)[0] == 0
    text = (tmp_path / "out" / "audit.md").read_text()
    for said in ("## By class", "## What differs between images", "channel weights at 1/32", "| heads of dilation 3 |"):
        assert said in text, said
    assert (tmp_path / "out" / "audit_watched.csv").exists()


def test_the_plain_unet_is_audited(plain_run, tmp_path, capsys):
    code, output, errors = run_main(["audit", plain_run, "--out", tmp_path / "out"], capsys)
    assert code == 0, errors
    assert "skip at 1/1" in output


def test_what_is_no_run_is_refused(atria_run, tmp_path, capsys):
    shutil.copytree(atria_run / "best", tmp_path / "network")
    shutil.copytree(atria_run, tmp_path / "repeats" / "run_1")
    for folder, got in (
        ("nothing", "no such folder; pass the folder that trifuse train wrote"),
        ("network", "a folder without run.json; pass the folder that trifuse train wrote"),
        ("repeats", "a folder without run.json; choose one of the runs in it: run_1"),
    ):
        code, _, errors = run_main(["audit", tmp_path / folder], capsys)
        assert code == 4
        assert f"expected the folder of a run, got {got}" in errors


def test_an_unknown_split_and_one_without_cases_are_refused(atria_run, tmp_path, capsys):
    code, _, errors = run_main(["audit", atria_run, "--split", "tset"], capsys)
    assert code == 2
    assert "did you mean test?" in errors
    with pytest.raises(ValueError, match=r"part: expected one of .*, got 'tset'; did you mean 'test'"):
        audit_run(atria_run, part="tset")
    run = shutil.copytree(atria_run, tmp_path / "run", ignore=shutil.ignore_patterns("audit"))
    split = read_record(run / "split.json")
    split |= {"train": [*split["train"], *split["test"]], "test": []}
    write_record(run / "split.json", split)
    code, _, errors = run_main(["audit", run], capsys)
    assert code == 3
    assert "test cases: expected at least one to audit the network on, got none" in errors
    assert "take those of another part: --split val or --split train" in errors
    assert not (run / "audit").exists()


def test_another_folder_is_not_replaced(atria_run, tmp_path, capsys):
    for name, text in (("mine.txt", "mine"), ("audit.md", "# Audit of the ward")):
        mine = tmp_path / name
        mine.write_text(text)
        code, _, errors = run_main(["audit", atria_run, "--out", tmp_path, "--overwrite"], capsys)
        assert code == 2
        assert "expected a new folder, an empty one or an earlier audit, got something else" in errors
        assert mine.read_text() == text


@pytest.mark.parametrize("share", ["0", "1", "1.5", "-0.1", "few", "nan"])
def test_a_threshold_is_a_share(share, atria_run, capsys):
    code, _, errors = run_main(["audit", atria_run, f"--threshold={share}"], capsys)
    assert code == 2
    assert f"expected a number between 0 and 1, such as 0.01, got {share!r}" in errors


def test_a_network_without_a_table_is_named(atria_run, tmp_path, monkeypatch):
    from trifuse.architectures.dino_unet import EXPERIMENT

    monkeypatch.setitem(vars(EXPERIMENT), "mechanisms", "")
    message = r"expected a network with a table of its mechanisms \(fias, .*\), got dino_unet; name one as mechanisms="
    with pytest.raises(CheckpointError, match=message):
        audit_run(atria_run, out=tmp_path / "out")
