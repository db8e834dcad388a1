"""Who may write into a run's folder, and that no run is lost to the one that replaces it."""

from __future__ import annotations

import errno
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from children import Child
from leftovers import leave_half
from run_folders import begin, contents, fill, make_run

from trifuse.architectures.runs import claim
from trifuse.architectures.runs.claim import claim_run_folder
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.architectures.storage.record import write_record
from trifuse.architectures.training.recipe import Recipe
from trifuse.architectures.training.run_folder import OutputFolderError, lock_folder

OF_OTHERS = {"thesis.tex": "three years", "figures/heart.svg": "drawn", "best/notes.txt": "mine", "data/x.nii.gz": "x"}
OF_OTHERS |= {"figures/x.png": "drawn", "predictions/test/case_1_mended.nii.gz": "hours of work"}


@dataclass(frozen=True)
class Data:
    root: str = ""


@dataclass(frozen=True)
class Whole:
    data: Data | DataRecipe = field(default_factory=Data)
    training: Recipe = field(default_factory=lambda: Recipe(epochs=1, batch_size=1, lr=1.0))


class Failure(Exception):
    """What a new run fails with."""


def fail(out: Path, files: dict[str, str], recipe=None, error=Failure, **how) -> None:
    """Claim a folder, prepare a run there up to these files, and fail."""
    with claim_run_folder(out, recipe, **how):
        fill(out, files)
        raise error


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"resume": True, "force": True}, {"overwrite": True}], ids=str)
def test_t17_a_running_folder_is_not_written_by_a_second_run(tmp_path, how):
    """Before this was so, --overwrite deleted the files of a run under its hands."""
    out = make_run(tmp_path / "run")
    before = contents(out)

    def second():
        with pytest.raises(OutputFolderError, match="in use by process"), claim_run_folder(out, **how):
            pass

    with claim_run_folder(out, resume=True):
        assert Child(second).wait() == 0
    assert contents(out) == before


def test_l4_l15_a_run_is_there_until_the_new_one_has_a_checkpoint(tmp_path, capsys):
    out = make_run(tmp_path / "run")
    before = contents(out)
    with claim_run_folder(out, overwrite=True):
        assert contents(out / "replaced_run") == before
        assert contents(out).keys() == {f"replaced_run/{name}" for name in before}
        assert "the run that is replaced lies in" in capsys.readouterr().err
        begin(out)
        assert contents(out).keys() == {"split.json", "last/training_state.json", "run.json"}


@pytest.mark.parametrize("error", [Failure, KeyboardInterrupt, SystemExit])
def test_l4_l15_a_run_is_put_back_when_the_new_one_fails_before_it_has_a_checkpoint(tmp_path, capsys, error):
    out = make_run(tmp_path / "run")
    before = contents(out)
    with pytest.raises(error):
        fail(
            out,
            {
                "split.json": "new",
                "cache/" + "0b" * 20 + ".npy": "new",
                "last/training_state.json": '{"position": {"step": 0}}',
            },
            error=error,
            overwrite=True,
        )
    assert contents(out) == before
    assert "is back in" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        "best", "cache", "figures", "last", "predictions",
    ]  # fmt: skip


def test_l4_l15_what_others_put_into_a_run_s_folder_stays(tmp_path):
    out = fill(make_run(tmp_path / "run"), OF_OTHERS)
    with claim_run_folder(out, overwrite=True):
        begin(out)
    assert {name: text.decode() for name, text in contents(out).items() if name in OF_OTHERS} == OF_OTHERS
    assert "report.md" not in contents(out)


@pytest.mark.parametrize(
    "files",
    [
        {"run.json": "{}", "thesis.tex": "three years"},
        {"run.json": '{"recipe": "soup"}', "report.md": "# mine"},
        {"split.json": '{"train": []}'},
        {"report.md": "# mine", "figures/a.png": "a"},
        {"cache/note.txt": "mine"},
        {".lock": "", "thesis.tex": "three years"},
    ],
    ids=["empty", "another program's", "split", "paper", "cache", "lock"],
)
@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}])
def test_l4_the_folder_of_others_is_refused_and_left_as_it_is(tmp_path, files, how):
    out = fill(tmp_path / "mine", files)
    with pytest.raises(OutputFolderError, match="choose another folder") as refusal, claim_run_folder(out, **how):
        pass
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == files.keys()
    assert "overwrite" not in str(refusal.value)
    assert "by hand" not in str(refusal.value)


def test_c22_a_run_whose_description_is_damaged_is_still_a_run(tmp_path):
    out = make_run(tmp_path / "run")
    whole = (out / "run.json").read_text()
    for damaged in (whole[:-3], whole.replace("recipe", "recipf")):
        (out / "run.json").write_text(damaged)
        with pytest.raises(OutputFolderError, match="holds a run; pass --resume"), claim_run_folder(out):
            pass
        with claim_run_folder(out, resume=True):  # where training refuses it, by its name
            pass
    (out / "run.json").write_text(whole[:5])
    with pytest.raises(OutputFolderError, match="holds no run of trifuse"), claim_run_folder(out, resume=True):
        pass


def test_l4_a_run_is_neither_continued_nor_replaced_unasked(tmp_path):
    out = make_run(tmp_path / "run")
    before = contents(out)
    with pytest.raises(OutputFolderError, match="holds a run; pass --resume to continue it"), claim_run_folder(out):
        pass
    with pytest.raises(OutputFolderError, match="either resumed or overwritten"):
        claim_run_folder(out, resume=True, overwrite=True).__enter__()
    assert contents(out) == before


@pytest.mark.parametrize("moved", range(1, 12))
def test_l4_l15_a_kill_while_the_run_is_moved_loses_no_file_of_it(tmp_path, moved, monkeypatch):
    """At each file, and before the folder gets its name: at the next start everything is back."""
    out = make_run(tmp_path / "run")
    before = contents(out)
    rename = os.rename

    def killed():
        left = [moved]

        def rename_some(*names):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            rename(*names)

        claim.os.rename = rename_some
        with claim_run_folder(out, overwrite=True):
            os._exit(1)

    assert Child(killed).wait() == 9
    with claim_run_folder(out, resume=True):
        assert contents(out) == before


def test_t3_a_run_that_cannot_be_moved_whole_stays(tmp_path, monkeypatch):
    """A folder below it is a disk of its own, or belongs to somebody else."""
    out = make_run(tmp_path / "run")
    before = contents(out)
    rename = os.rename

    def refuse(source, target):
        if "overlays.png" in str(target) and "replaced_run" in str(target):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(claim.os, "rename", refuse)
    with pytest.raises(OSError, match="cross-device"), claim_run_folder(out, overwrite=True):
        pass
    assert contents(out) == before


def test_l4_after_a_kill_the_new_run_and_the_old_one_waits(tmp_path):
    out = make_run(tmp_path / "run")
    before = contents(out)

    def killed():
        with claim_run_folder(out, overwrite=True):
            fill(out, {"split.json": "new"})
            os._exit(9)

    assert Child(killed).wait() == 9
    with pytest.raises(OutputFolderError, match="pass --resume"), claim_run_folder(out):
        pass
    with claim_run_folder(out, resume=True):
        assert contents(out / "replaced_run") == before
    with claim_run_folder(out, overwrite=True):
        assert contents(out / "replaced_run") == before
        begin(out)
    assert not (out / "replaced_run").exists()


def test_l4_a_new_run_that_was_killed_after_its_first_checkpoint_is_the_run(tmp_path):
    out = make_run(tmp_path / "run")

    def killed():
        with claim_run_folder(out, overwrite=True):
            begin(out, discards=False)
            os._exit(9)

    assert Child(killed).wait() == 9
    assert (out / "replaced_run").exists()
    with claim_run_folder(out, resume=True):
        assert contents(out).keys() == {"split.json", "last/training_state.json", "run.json"}


@pytest.mark.parametrize("file", ["first_pass/fold_1/last/training_state.json", "start.json"])
def test_l15_what_a_new_run_has_trained_or_why_it_stopped_is_not_thrown_away(tmp_path, capsys, file):
    out = make_run(tmp_path / "run")
    before = contents(out)
    with pytest.raises(Failure):
        fail(out, {file: "hours of work", "crash/step_0_rank_0.json": "the sample"}, overwrite=True)
    assert contents(out / "replaced_run") == before
    assert (out / file).exists()
    assert (out / "crash/step_0_rank_0.json").exists()
    assert "pass --resume to go on with the new one" in capsys.readouterr().err


def test_l5_what_the_new_run_reads_is_not_replaced(tmp_path):
    """Labels that the old run predicted, its encoder, or a link to its folder: all are gone once it is aside."""
    out = make_run(tmp_path / "run")
    before = contents(out)
    (tmp_path / "link").symlink_to(out)
    for named in (out / "predictions" / "test", out / "best" / "model.safetensors", out, tmp_path / "link" / "best"):
        with pytest.raises(OutputFolderError, match="is needed by the new run"):
            claim_run_folder(out, Whole(data=Data(str(named))), overwrite=True).__enter__()
    assert contents(out) == before
    with claim_run_folder(out, Whole(data=Data(str(tmp_path))), overwrite=True):  # a study that the run lies in
        begin(out)


def test_l5_cases_of_the_new_run_that_are_links_into_the_old_one_are_not_replaced(tmp_path):
    """Labels that the old run predicted, linked one by one into a cohort that lies elsewhere."""
    out = make_run(tmp_path / "run")
    before = contents(out)
    cohort = fill(tmp_path / "cohort", {"images/a.nii.gz": "image"})
    (cohort / "labels").mkdir()
    (cohort / "labels" / "a.nii.gz").symlink_to(out / "predictions" / "test" / "case_1.nii.gz")
    with pytest.raises(OutputFolderError, match=r"case_1\.nii\.gz is needed by the new run"):
        claim_run_folder(out, Whole(data=DataRecipe(str(cohort))), overwrite=True).__enter__()
    assert contents(out) == before


def test_l4_repeats_replace_others_once_one_of_them_has_a_checkpoint(tmp_path):
    out = make_run(tmp_path / "runs", {})
    make_run(out / "run_1")
    write_record(out / "run.json", {"repeated": {}})
    with claim_run_folder(out, overwrite=True):
        write_record(out / "run.json", {"repeated": {"new": 1}})
        begin(out / "run_1")
        assert (out / "replaced_run" / "run_1" / "log.csv").exists()
    assert contents(out).keys() == {"run.json", *(f"run_1/{name}" for name in contents(out / "run_1"))}


def test_parts_of_repeats_are_looked_at_for_locks_too(tmp_path):
    out = make_run(tmp_path / "runs", {})
    write_record(out / "run.json", {"repeated": {}})
    make_run(out / "run_1")
    fill(out / "run_1", {".lock": ""})

    def second():
        with pytest.raises(OutputFolderError, match="run_1 is in use"), claim_run_folder(out, overwrite=True):
            pass

    with lock_folder(out / "run_1"):
        assert Child(second).wait() == 0
    before = contents(out)
    with claim_run_folder(out, overwrite=True):
        assert contents(out / "replaced_run") == before


def test_t23_the_folder_may_be_a_link(tmp_path):
    """Removing it failed after its content was gone."""
    out = make_run(tmp_path / "scratch")
    (tmp_path / "run").symlink_to(out)
    with claim_run_folder(tmp_path / "run", overwrite=True):
        begin(tmp_path / "run")
    assert (tmp_path / "run").is_symlink()
    assert contents(out).keys() == {"split.json", "last/training_state.json", "run.json"}


def test_t23_the_folder_may_be_where_a_disk_is_mounted(tmp_path):
    out = tmp_path / "run"
    out.mkdir()

    def mounted():
        subprocess.run(["mount", "-t", "tmpfs", "none", out], check=True)
        make_run(out)
        with claim_run_folder(out, overwrite=True):
            begin(out)
        assert contents(out).keys() == {"split.json", "last/training_state.json", "run.json"}

    if not hasattr(os, "unshare"):
        libc = pytest.importorskip("ctypes").CDLL(None, use_errno=True)
        own_mounts = lambda: libc.unshare(0x00020000)  # noqa: E731 - CLONE_NEWNS
    else:
        own_mounts = lambda: os.unshare(os.CLONE_NEWNS) or 0  # noqa: E731
    if os.geteuid() != 0 or Child(lambda: os._exit(0 if own_mounts() == 0 else 1)).wait() != 0:
        pytest.skip("needs the right to mount")
    assert Child(lambda: (own_mounts(), mounted())).wait() == 0


def test_l4_t25_what_a_start_left_that_failed_is_no_obstacle(tmp_path):
    """Slices are found by what they were made of; the recipe and the split are those of the new start."""
    out = tmp_path / "run"
    slices = "cache/" + "0a" * 20 + ".npy"
    with pytest.raises(Failure):
        fail(out, {"split.json": "old", slices: "slices"}, Whole())
    leave_half(out / "split.json")
    other = Whole(training=Recipe(epochs=2, batch_size=1, lr=1.0))
    with claim_run_folder(out, other):
        assert contents(out).keys() == {"recipe.json", slices}


def test_t1_t25_what_was_prepared_is_gone_on_with_under_the_same_recipe_alone(tmp_path, capsys):
    """No run.json says yet what the networks of a first pass are for."""
    out = tmp_path / "run"
    network = "first_pass/fold_1/last/training_state.json"
    with pytest.raises(Failure):
        fail(out, {"split.json": "{}", network: "{}"}, Whole())
    with pytest.raises(OutputFolderError, match="pass --resume to continue it"), claim_run_folder(out, Whole()):
        pass
    with claim_run_folder(out, Whole(), resume=True):
        assert {"split.json", network} <= contents(out).keys()
    other = Whole(training=Recipe(epochs=2, batch_size=1, lr=1.0))
    with (
        pytest.raises(OutputFolderError, match=r"training\.epochs: 1 -> 2"),
        claim_run_folder(out, other, resume=True),
    ):
        pass
    with claim_run_folder(out, Whole(training=Recipe(epochs=1, batch_size=1, lr=1.0, workers=2)), resume=True):
        pass
    with claim_run_folder(out, other, resume=True, force=True):
        assert network in contents(out)
    assert "under a changed recipe: training.epochs: 1 -> 2" in capsys.readouterr().err
    with claim_run_folder(out, other, resume=True):
        pass
