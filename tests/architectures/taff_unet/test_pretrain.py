"""Training the ECG autoencoder: which records are read, what counts, what is reported, and a record never seen."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_ecg import median

from trifuse.architectures.data.ecg.beat_dataset import NetworkBeat
from trifuse.architectures.data.phantoms.scar import write_scar_phantom
from trifuse.architectures.evaluation.ecg_report import reconstruct
from trifuse.architectures.runs.run_description import describe_training
from trifuse.architectures.taff_unet import EcgAutoencoder, EcgAutoencoderConfig, pretrain
from trifuse.architectures.taff_unet.pretrain import (
    BeatValidation,
    EcgData,
    EcgPretrainingRecipe,
    ReconstructionLoss,
    build_network,
    fit_network,
    prepare_beats,
    train,
    training_defaults,
)
from trifuse.architectures.training.compiled_forward import Compilation
from trifuse.architectures.training.recipe import Recipe
from trifuse.architectures.training.run_folder import OutputFolderError
from trifuse.kernels import CheckpointError, DataError

SMALL = EcgAutoencoderConfig(base_dim=2, z_dim=8)


def recipe(root: Path, *, epochs: int = 2, **changes) -> EcgPretrainingRecipe:
    data = changes.pop("data", {})
    training = Recipe(epochs=epochs, batch_size=2, lr=3e-3, device="cpu", best_epoch_by="val_explained")
    return EcgPretrainingRecipe(data=EcgData(root=str(root), **data), network=SMALL, training=training, **changes)


@pytest.fixture
def records(tmp_path) -> Path:
    """A folder of four median beats and one file that is none."""
    folder = tmp_path / "records"
    folder.mkdir()
    for number in range(4):
        np.save(folder / f"r{number}.npy", median(number).astype(np.float32))
    (folder / "broken.npy").write_bytes(b"no array")
    return folder


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    write_scar_phantom(folder, 5, 0, (32, 32, 3), val=1, test=1)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def names(data: EcgData) -> dict[str, list[str]]:
    return {part: [source.record for source in sources] for part, sources in data.sources().items()}


# ---------------------------------------------------------------------------------------------------------- a run


def test_from_records_to_a_report(records, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "compilation_of", lambda run: Compilation(eager_since=2, reason="no compiler"))
    out = tmp_path / "run"
    plan = recipe(records, data={"test_records": ("r1",), "val_records": ("r3",)})
    report = train(plan, out, command=["trifuse", "train", "ecg", str(records)])
    assert report == out / "report.md"
    noted = json.loads((out / "results.json").read_text())["compilation"]
    assert noted == {"shapes": {}, "surplus_since": None, "eager_since": 2, "reason": "no compiler"}
    best = EcgAutoencoder.from_pretrained(out / "best")
    text = report.read_text()
    errors = {row["record"]: row for row in rows(out / "reconstruction.csv")}
    parts = {name: row["part"] for name, row in errors.items()}
    assert parts == {"r0": "train", "r2": "train", "r3": "val", "r1": "test"}
    beat = next(beat for beat in prepare_beats(plan).parts["test"])
    again = best(beat.ecg[None])[0, :, 4:-4]
    mine = ((again - beat.ecg[:, 4:-4]) ** 2).mean(1)  # of a z-scored lead: relative to predicting zero
    assert float(errors["r1"]["V3"]) == pytest.approx(mine[8].item(), rel=1e-4)
    assert float(errors["r1"]["all_leads"]) == pytest.approx(mine.mean().item(), rel=1e-4)
    assert f"**Reconstruction error {mine.mean():.3f}** of that of a flat line, over 1 test record." in text
    assert "**1 record left out**" in text
    assert re.search(r"\| broken \| training \|", text)
    status = {row["record"]: row["status"] for row in rows(out / "records.csv")}
    assert status == {"r0": "used", "r1": "used", "r2": "used", "r3": "used", "broken": "left out"}
    for picture in ("reconstruction_1", "lead_attention", "temporal_attention", "curves"):
        assert (out / "figures" / f"{picture}.png").stat().st_size > 10_000
        assert f"figures/{picture}.png" in text
    assert str(tmp_path) not in text
    assert "on the validation records" in text
    for name, value in describe_training(plan.training).items():
        assert f"| {name} | {value} |" in text
    assert "| Loss | mean squared error over usable leads, with the padding |" in text
    assert "| Augmentation | each lead hidden with probability" in text
    log = rows(out / "log.csv")
    scores = [float(row["val_explained"]) for row in log]
    validation = BeatValidation(prepare_beats(plan).parts["val"], 4)(best)
    assert max(scores) == pytest.approx(validation["explained"], abs=1e-6)
    assert float(log[0]["val_reconstruction_loss"]) == pytest.approx(1 - scores[0])


def test_the_voltage_is_kept_where_the_autoencoder_takes_it(records, tmp_path):
    plan = recipe(records, mixing=0.5)
    plan = replace(plan, network=replace(plan.network, lead_scaling="voltage"))
    spreads = torch.stack([beat.ecg.std(1) for beat in prepare_beats(plan).parts["train"]])
    assert spreads.max() / spreads.min() > 1.5
    text = train(plan, tmp_path / "run").read_text()
    assert "| Leads | of 0.1 mV about each lead's mean |" in text
    assert EcgAutoencoder.saved_config(tmp_path / "run" / "best").lead_scaling == "voltage"
    further = EcgPretrainingRecipe(data=plan.data, init=str(tmp_path / "run" / "best"))
    assert build_network(further).config.lead_scaling == "voltage"


def fitted(plan: EcgPretrainingRecipe, out: Path) -> list[dict[str, str]]:
    """Train without a report; return the rows of the log."""
    fit_network(build_network(plan), plan, prepare_beats(plan), out)
    return rows(out / "log.csv")


def test_a_run_repeats_itself_and_its_folder_is_its_own(records, tmp_path):
    plan = recipe(records, lead_masking=0.4, mixing=0.5)
    logs = [fitted(plan, tmp_path / name) for name in ("a", "b")]
    states = [EcgAutoencoder.from_pretrained(tmp_path / name / "best").state_dict() for name in ("a", "b")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert logs[0][-1]["loss"] == logs[1][-1]["loss"] != fitted(recipe(records), tmp_path / "c")[-1]["loss"]
    with pytest.raises(OutputFolderError, match="pass --resume to continue it"):
        train(plan, tmp_path / "a")
    with pytest.raises(OutputFolderError, match="lead_masking"):
        train(recipe(records, mixing=0.5), tmp_path / "a", resume=True)


def test_t14_a_run_does_not_go_on_with_other_records_to_validate_on(records, tmp_path):
    plan = recipe(records, data={"val_records": ("r1",)})
    fitted(plan, tmp_path / "run")
    np.save(records / "r1.npy", median(9).astype(np.float32))
    with pytest.raises(OutputFolderError, match=r"digests\.r1: "):
        fit_network(build_network(plan), plan, prepare_beats(plan), tmp_path / "run", resume=True)


def test_it_learns(records, tmp_path):
    plan = recipe(records, epochs=12, lead_masking=0.0)
    log = fitted(replace(plan, training=replace(plan.training, lr=2e-2)), tmp_path / "run")
    assert float(log[-1]["loss"]) < 0.7 * float(log[0]["loss"])


def real_recipe(data: Path, *, epochs: int) -> EcgPretrainingRecipe:
    """All real records train but one, which is never seen."""
    return EcgPretrainingRecipe(
        data=EcgData(
            root=str(data / "ptbxl_subset"),
            kind="records",
            also=(str(data / "ptbdb_s0010"),),
            test_records=("*06000_hr",),
        ),
        training=Recipe(
            epochs=epochs,
            batch_size=3,
            lr=4e-3,
            weight_decay=5e-5,
            betas=(0.9, 0.95),
            warmup_epochs=epochs / 5,
            seed=1,
            device="cpu",
            best_epoch_by="val_explained",
        ),
        mixing=0.9,
        network=EcgAutoencoderConfig(init_seed=1),
    )


def test_real_records_train_it(trifuse_data, tmp_path):
    plan = real_recipe(trifuse_data, epochs=6)
    beats = prepare_beats(plan)
    assert {part: len(found) for part, found in beats.parts.items()} == {"train": 6, "val": 0, "test": 1}
    assert not any(beats.left_out.values())
    log = fitted(plan, tmp_path / "run")
    assert float(log[-1]["loss"]) < 0.95 * float(log[0]["loss"])


@pytest.mark.slow
def test_a_record_never_seen_is_drawn_with_half_the_error_of_a_flat_line(trifuse_data, tmp_path):
    plan = real_recipe(trifuse_data, epochs=300)
    fitted(plan, tmp_path / "run")
    best = EcgAutoencoder.from_pretrained(tmp_path / "run" / "best")
    assert BeatValidation(prepare_beats(plan).parts["test"], 1)(best)["reconstruction_loss"] < 0.5


# ----------------------------------------------------------------------------------------------- which ECGs are read


def test_only_the_training_cases_of_a_cohort_are_read(cohort, tmp_path):
    data = EcgData(root=str(cohort))
    split = {row["case_id"]: row["split"] for row in rows(cohort / "cases.csv")}
    assert data.found_kind == "cohort"
    assert names(data) == {"train": [case for case, part in split.items() if part == "train"], "val": [], "test": []}
    assert len(names(data)["train"]) == 3
    own = tmp_path / "cohort"
    own.mkdir()
    for folder in ("lge", "seg"):
        (own / folder).symlink_to(cohort / folder)
    (own / "ecg").mkdir()
    (own / "cases.csv").write_bytes((cohort / "cases.csv").read_bytes())
    for row in rows(cohort / "cases.csv"):  # the others' ECGs could not be read without an error or a word
        never = f"never to be read: {row}".encode()
        content = (cohort / row["ecg_path"]).read_bytes() if row["split"] == "train" else never
        (own / row["ecg_path"]).write_bytes(content)
    beats = prepare_beats(recipe(own))
    assert {part: len(found) for part, found in beats.parts.items()} == {"train": 3, "val": 0, "test": 0}
    assert not any(beats.left_out.values())
    assert beats.validated_on == "train"


def test_a_cohort_needs_a_split(cohort, tmp_path):
    text = (cohort / "cases.csv").read_text()
    for folder in ("lge", "seg", "ecg"):
        (tmp_path / folder).symlink_to(cohort / folder)
    table = rows(cohort / "cases.csv")
    with open(tmp_path / "cases.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, [name for name in table[0] if name != "split"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table)
    assert "split" in text
    with pytest.raises(DataError, match="lest test cases be fitted"):
        EcgData(root=str(tmp_path)).sources()
    split = {"train": ["case002", "case004"], "val": ["case001", "case003"], "test": ["case005"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    assert names(EcgData(root=str(tmp_path), split=str(tmp_path / "split.json")))["train"] == ["case002", "case004"]


def test_folds_of_ptb_xl(trifuse_data):
    data = EcgData(root=str(trifuse_data / "ptbxl_subset"), also=(str(trifuse_data / "ptbdb_s0010"),))
    assert data.found_kind == "ptbxl"
    assert names(data) == {"train": ["1", "6001", "6002", "6005", "s0010_re"], "val": [], "test": ["6000", "6004"]}
    moved = replace(data, val_records=("6004", "6001"), test_records=("s0010*",))
    expected = {"train": ["1", "6002", "6005"], "val": ["6004", "6001"], "test": ["6000", "s0010_re"]}
    assert names(moved) == expected
    with pytest.raises(DataError, match="none of that name"):
        replace(data, test_records=("7*",)).sources()


def test_records_that_are_named_twice_are_refused(records, tmp_path):
    further = tmp_path / "further"
    further.mkdir()
    np.save(further / "x.npy", median().astype(np.float32))
    assert names(EcgData(root=str(records), also=(str(further),)))["train"][-1] == "x"
    for also in ((str(further), str(further)), (str(records),), (str(records / ".." / "records" / "r1.npy"),)):
        with pytest.raises(DataError, match="also: expected folders without records that are used already"):
            EcgData(root=str(records), also=also).sources()


def test_d28_an_ecg_in_two_parts_is_refused(records, cohort, tmp_path):
    """Whatever it is called; and a copy of that of a case which the run must not see."""
    further = tmp_path / "further"
    further.mkdir()
    shutil.copy(records / "r1.npy", further / "other.npy")
    data = EcgData(root=str(records), also=(str(further),), test_records=("r1",))
    with pytest.raises(DataError, match=r"same ECG in two parts: .*other\.npy in train and .*r1\.npy in test"):
        data.sources()
    assert replace(data, test_records=("r1", "other")).sources()["test"][1].record == "other"
    for part in ("val", "test"):
        held = next(row["ecg_path"] for row in rows(cohort / "cases.csv") if row["split"] == part)
        shutil.copy(cohort / held, further / f"other{Path(held).suffix}")
        with pytest.raises(DataError, match=rf"other\S+ in train and \S+{Path(held).name} in a held-out case"):
            EcgData(root=str(cohort), also=(str(further),)).sources()


def test_t14_records_of_one_name_in_two_folders_are_told_apart(records, tmp_path):
    """Else a change of one of them would go unnoticed."""
    for name in ("a", "b"):
        (tmp_path / name / "more").mkdir(parents=True)
        np.save(tmp_path / name / "more" / "r1.npy", median(ord(name)).astype(np.float32))
    also = tuple(str(tmp_path / name / "more") for name in ("a", "b"))
    data = EcgData(root=str(records), also=also)
    found = names(data)["train"]
    assert found == ["broken", "r0", "r1", "r2", "r3", "more/r1", "b/more/r1"]
    assert names(replace(data, test_records=("r1",)))["test"] == ["r1", "more/r1", "b/more/r1"]
    assert names(replace(data, val_records=("b/*",)))["val"] == ["b/more/r1"]


def test_records_and_patterns(records):
    beats = prepare_beats(recipe(records))
    assert [missed.record for missed in beats.left_out["train"]] == ["broken"]
    assert names(EcgData(root=str(records), test_records=("r[12]",))) == {
        "train": ["broken", "r0", "r3"],
        "val": [],
        "test": ["r1", "r2"],
    }
    with pytest.raises(DataError, match="training records"):
        EcgData(root=str(records), test_records=("*",)).sources()
    with pytest.raises(DataError, match="none that can be used"):
        prepare_beats(recipe(records, data={"test_records": ("r*",)}))


# ------------------------------------------------------------------------------------------------------ what counts


def test_leads_that_are_not_usable_do_not_count():
    generator = torch.Generator().manual_seed(0)
    target, drawn = (torch.randn(2, 12, 608, generator=generator) for _ in range(2))
    usable = torch.ones(2, 12, dtype=torch.bool)
    usable[0, :9] = False
    batch = {"target": target, "usable": usable, "sample_weight": torch.ones(2)}
    loss = ReconstructionLoss()(drawn, batch, None)
    errors = (drawn - target).square().mean(2)
    torch.testing.assert_close(loss, (errors[0, 9:].mean() + errors[1].mean()) / 2)
    batch["sample_weight"] = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(ReconstructionLoss()(drawn, batch, None), errors[1].mean())
    inner = (drawn - target)[1, :, 4:-4].square().mean()
    torch.testing.assert_close(ReconstructionLoss(mask_padding=True)(drawn, batch, None), inner)


class Flat(torch.nn.Module):
    """Predicts a constant."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, ecg):
        return self.value.expand_as(ecg)


def test_a_flat_line_has_error_one():
    ecg = torch.zeros(12, 608)
    inner = torch.randn(12, 600, generator=torch.Generator().manual_seed(0))
    ecg[:, 4:-4] = (inner - inner.mean(1, keepdim=True)) / inner.std(1, correction=0, keepdim=True)
    ecg[5] = 0
    beat = NetworkBeat("r", ecg, (ecg != 0).any(1))
    assert BeatValidation([beat], 4)(Flat(0.0)) == pytest.approx({"explained": 0.0, "reconstruction_loss": 1.0})
    assert BeatValidation([beat, beat], 1)(Flat(0.5))["reconstruction_loss"] == pytest.approx(1.25)
    assert np.isnan(reconstruct(Flat(0.0), [beat])[1]).tolist() == [[lead == 5 for lead in range(12)]]


# ---------------------------------------------------------------------------------------------- recipes, starting


def test_defaults():
    training = EcgPretrainingRecipe().training
    assert (training.optimizer, training.weight_decay, training.betas) == ("adamw", 5e-5, (0.9, 0.95))
    assert (training.lr, training.batch_size, training.epochs) == (1e-3, 128, 300)
    assert training.warmup_epochs == pytest.approx(60)
    assert training_defaults(cohort=True) == {
        "training.epochs": 100,
        "training.warmup_epochs": pytest.approx(20),
        "training.lr": 1e-4,
    }
    assert training_defaults(cohort=False, epochs=10) == {
        "training.epochs": 10,
        "training.warmup_epochs": pytest.approx(2),
    }


def test_starting_from_a_trained_autoencoder(records, tmp_path):
    model = EcgAutoencoder(replace(SMALL, lead_layout="upstream", init_seed=9))
    model.save_pretrained(tmp_path / "init")
    start = EcgPretrainingRecipe(data=EcgData(root=str(records)), init=str(tmp_path / "init"))
    loaded = build_network(start)
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    tiny = replace(start.training, epochs=1, batch_size=4, lr=1e-9, warmup_epochs=0, device="cpu")
    report = train(replace(start, training=tiny), tmp_path / "run").read_text()
    assert "the autoencoder in init" in report
    assert "**which it was trained on**" in report
    tuned = EcgAutoencoder.from_pretrained(tmp_path / "run" / "best")
    torch.testing.assert_close(tuned.encoder.mean_head.weight, model.encoder.mean_head.weight, atol=1e-6, rtol=0)
    with pytest.raises(CheckpointError, match="leave network to init"):
        build_network(replace(start, network=replace(SMALL, z_dim=4)))
    EcgAutoencoder(EcgAutoencoderConfig(time_steps=64, base_dim=2)).save_pretrained(tmp_path / "short")
    with pytest.raises(CheckpointError, match="beats of 64 samples, not 608"):
        build_network(replace(start, init=str(tmp_path / "short")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EcgPretrainingRecipe(network=EcgAutoencoderConfig(time_steps=64)), "network.time_steps must be 608"),
        (lambda: EcgPretrainingRecipe(lead_masking=1.0), r"lead_masking must be in \[0, 1\), got 1.0"),
        (lambda: EcgPretrainingRecipe(mixing=-0.5), r"mixing must be in \[0, 1\), got -0.5"),
        (lambda: EcgData(kind="folder"), "kind: expected one of 'auto', 'ptbxl', 'cohort', 'records', got 'folder'"),
        (lambda: EcgData(min_beats=0), "min_beats must be at least 1, got 0"),
    ],
)
def test_refused_recipes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
