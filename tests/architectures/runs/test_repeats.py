"""Repeated training: other seeds, nothing done twice, one recipe for all runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest

from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.scoring import OK, Row
from trifuse.architectures.evaluation.tables import write_case_table
from trifuse.architectures.runs import repeats
from trifuse.architectures.runs.repeats import repeat_training
from trifuse.architectures.storage.record import read_record, write_record
from trifuse.architectures.training.recipe import Recipe
from trifuse.architectures.training.run_folder import OutputFolderError


@dataclass(frozen=True)
class Network:
    RENAMED: ClassVar[dict[str, str]] = {"seed": "init_seed"}

    init_seed: int = 3


@dataclass(frozen=True)
class Whole:
    network: Network = field(default_factory=Network)
    training: Recipe = field(default_factory=lambda: Recipe(epochs=1, batch_size=1, lr=1e-3, seed=2222, device="cpu"))


class Trainer:
    """Leaves what a finished run leaves, and keeps what it was asked."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.options: list[dict] = []
        self.fails_at = fails_at

    def __call__(self, recipe, out, **options):
        self.asked.append((out.name, recipe.training.seed, recipe.network.init_seed))
        self.options.append(options)
        if len(self.asked) == self.fails_at:
            raise KeyboardInterrupt
        out.mkdir(exist_ok=True)
        chosen = Conventions()
        write_case_table(
            out / "test_cases.csv", [Row("a", "a", "LV", None, OK, dict.fromkeys(chosen.metrics, 0.5), chosen)]
        )
        (out / "log.csv").write_text("epoch,loss,val_dice\n1,1,0.5\n")
        (out / "report.md").write_text(repr(recipe.training))
        return out / "report.md"


@pytest.fixture(autouse=True)
def finished(monkeypatch):
    """Let a run be finished if it reports the recipe that is asked for: those here have no cohort."""

    def is_kept(run, recipe, parts):
        report = run / "report.md"
        return (
            report.exists() and report.read_text() == repr(replace(recipe.training, workers=0)) and parts == ("test",)
        )

    monkeypatch.setattr(repeats, "is_kept", is_kept)


def test_each_run_has_seeds_of_its_own(tmp_path):
    trainer = Trainer()
    report = repeat_training(trainer, Whole(), tmp_path / "out", 5, title="FIAS", command=["trifuse"])
    assert trainer.asked == [(f"run_{k}", 2222 + k, 3 + k) for k in range(1, 6)]
    assert report == tmp_path / "out" / "report.md"
    text = report.read_text()
    assert text.startswith("# FIAS, 5 runs")
    assert "over 5 runs" in text
    assert all(f"| run_{k} | {2222 + k} |" in text for k in range(1, 6))
    assert all(options["command"] == ["trifuse"] for options in trainer.options)


def test_finished_runs_are_not_repeated(tmp_path):
    trainer = Trainer(fails_at=3)
    with pytest.raises(KeyboardInterrupt):
        repeat_training(trainer, Whole(), tmp_path / "out", 3, title="t")
    assert not (tmp_path / "out" / "report.md").exists()
    trainer = Trainer()
    with pytest.raises(OutputFolderError, match="pass --resume"):
        repeat_training(trainer, Whole(), tmp_path / "out", 3, title="t")
    repeat_training(trainer, Whole(), tmp_path / "out", 4, title="t", resume=True)
    assert [name for name, *_ in trainer.asked] == ["run_3", "run_4"]
    assert all(options["resume"] and not options["overwrite"] for options in trainer.options)


def test_another_recipe_is_not_mixed_in(tmp_path):
    repeat_training(Trainer(), Whole(), tmp_path / "out", 1, title="t")
    other = replace(Whole(), training=replace(Whole().training, lr=1e-2))
    with pytest.raises(OutputFolderError, match=r"(?s)another configuration.*lr: 0\.001 -> 0\.01"):
        repeat_training(Trainer(), other, tmp_path / "out", 2, title="t", resume=True)
    elsewhere = replace(Whole(), training=replace(Whole().training, workers=1))  # decides nothing
    repeat_training(Trainer(), elsewhere, tmp_path / "out", 2, title="t", resume=True)
    trainer = Trainer()
    repeat_training(trainer, other, tmp_path / "out", 1, title="t", overwrite=True)
    assert [name for name, *_ in trainer.asked] == ["run_1"]
    assert not (tmp_path / "out" / "run_2").exists()


def test_t13_finished_runs_are_trained_longer(tmp_path):
    """Each once, whether they are forced or not."""
    repeat_training(Trainer(), Whole(), tmp_path / "out", 2, title="t")
    longer = replace(Whole(), training=replace(Whole().training, epochs=2))
    with pytest.raises(KeyboardInterrupt):
        repeat_training(Trainer(fails_at=2), longer, tmp_path / "out", 2, title="t", resume=True)
    trainer = Trainer()
    repeat_training(trainer, longer, tmp_path / "out", 2, title="t", resume=True)
    assert [name for name, *_ in trainer.asked] == ["run_2"]


def test_repeats_of_an_older_version_are_continued(tmp_path):
    repeat_training(Trainer(), Whole(), tmp_path, 1, title="t")
    file = tmp_path / "run.json"
    written = read_record(file)
    written["repeated"]["network"] = {"seed": 3}
    write_record(file, written)
    trainer = Trainer()
    repeat_training(trainer, Whole(), tmp_path, 2, title="t", resume=True)
    assert [name for name, *_ in trainer.asked] == ["run_2"]


def test_the_paper_is_asked_for_that_many_targets(tmp_path):
    asked = []
    repeat_training(Trainer(), Whole(), tmp_path, 1, title="t", paper_tables=lambda n: asked.append(n) or ())
    assert asked == [1]
    assert repeats.with_seeds(Whole(), 2).training.lr == Whole().training.lr
