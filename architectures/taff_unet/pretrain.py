"""Train the ECG autoencoder: on PTB-XL or a folder of records, or further on the training cases of a cohort."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from torch import Tensor, nn

from trifuse.architectures.data.ecg.beat_dataset import BeatDataset, LeftOut, NetworkBeat, load_beats
from trifuse.architectures.evaluation.ecg_report import reconstruct, write_ecg_report
from trifuse.architectures.evaluation.report import check_extras
from trifuse.architectures.runs.claim import claim_run_folder
from trifuse.architectures.runs.pipeline import RunOptions
from trifuse.architectures.runs.results import noted_results
from trifuse.architectures.runs.run_description import (
    compilation_of,
    describe_compilation,
    describe_run,
    describe_training,
)
from trifuse.architectures.runs.sessions import earlier_commands
from trifuse.architectures.storage.best_epoch import LAST
from trifuse.architectures.storage.lead_scaling import SCALING_WORDS
from trifuse.architectures.training.distributed import open_world
from trifuse.architectures.training.loop import FitResult, fit
from trifuse.architectures.training.recipe import Recipe
from trifuse.architectures.training.run_folder import DIGESTS
from trifuse.architectures.training.scar_losses import reconstruction_loss
from trifuse.kernels import CheckpointError, DataError
from trifuse.kernels.choices import check_choice

from .ecg_autoencoder import EcgAutoencoder, EcgAutoencoderConfig
from .ecg_data import EcgData, Part

BEAT_STEPS = 608
WARMUP_SHARE = 0.2  # of all steps
EXPLAINED = "val_explained"  # the score of a validation, as a column of the log


@dataclass(frozen=True)
class EcgPretrainingRecipe:
    """A run of the ECG autoencoder; the defaults are those of pre-training on PTB-XL.

    Attributes:
        data: which ECGs.
        network: the autoencoder.
        init: folder of a trained autoencoder to start from, which also says what ``network`` is.
        training: how it is trained.
        lead_masking: probability with which a lead is hidden from the network while training; it has to draw it all the
            same.
        mixing: largest share of another training record that is mixed into one; of use where records are few.
        mask_padding: leave the padded samples at either end out of the loss.

    Raises:
        ValueError: a network for other beats, a probability or share outside [0, 1), weights to start from in
            ``training``, or a best epoch by a score that autoencoders do not have.
    """

    data: EcgData = field(default_factory=EcgData)
    network: EcgAutoencoderConfig = field(default_factory=EcgAutoencoderConfig)
    init: str | None = None
    training: Recipe = field(
        default_factory=lambda: Recipe(
            epochs=300,
            batch_size=128,
            lr=1e-3,
            weight_decay=5e-5,
            betas=(0.9, 0.95),
            warmup_epochs=300 * WARMUP_SHARE,
            best_epoch_by=EXPLAINED,
        )
    )
    lead_masking: float = 0.25
    mixing: float = 0.0
    mask_padding: bool = False

    def __post_init__(self) -> None:
        if self.network.time_steps != BEAT_STEPS:
            raise ValueError(f"network.time_steps must be {BEAT_STEPS}, the length of a beat with its padding")
        for name in ("lead_masking", "mixing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.training.init is not None:
            raise ValueError(f"training.init must be None, got {self.training.init!r}; an autoencoder starts from init")
        check_choice("training.best_epoch_by", self.training.best_epoch_by, (EXPLAINED, LAST))

    @staticmethod
    def upgraded(values: dict[str, Any]) -> dict[str, Any]:
        """Spell out how older versions chose the best epoch: by what the autoencoder explains."""
        training = values.get("training")
        if not isinstance(training, dict):
            return values
        return {**values, "training": {"best_epoch_by": EXPLAINED, **training}}


def training_defaults(*, cohort: bool, epochs: int | None = None) -> dict[str, Any]:
    """Return the defaults, by dotted name, that differ for fine-tuning on a cohort and for runs of other lengths.

    Args:
        cohort: whether a cohort's training cases are fitted.
        epochs: of the run, where they are given.
    """
    epochs = epochs or (100 if cohort else 300)
    rate = {"training.lr": 1e-4} if cohort else {}
    return {"training.epochs": epochs, "training.warmup_epochs": WARMUP_SHARE * epochs, **rate}


def chosen_defaults(given: Mapping[str, Any], config: Path | None) -> dict[str, Any]:
    """Return `training_defaults` for what a command gives."""
    return training_defaults(cohort=given.get("data.kind") == "cohort", epochs=given.get("training.epochs"))


@dataclass(frozen=True)
class PreparedBeats:
    """The beats of each part, and the records that gave none."""

    parts: Mapping[Part, Sequence[NetworkBeat]]
    left_out: Mapping[Part, Sequence[LeftOut]]

    @property
    def validated_on(self) -> Part:
        """Where the best epoch is chosen: on the validation records, or the training records where there are none."""
        return "val" if self.parts["val"] else "train"


@dataclass(frozen=True)
class ReconstructionLoss:
    """`reconstruction_loss` of an autoencoder's output, for `fit`; leads that are not usable do not count."""

    mask_padding: bool = False

    def __call__(self, outputs: Tensor, batch: Mapping[str, Any], reduce: Any) -> Tensor:
        """Return the loss for ``batch["target"]``."""
        return reconstruction_loss(
            outputs,
            batch["target"],
            usable=batch["usable"],
            mask_padding=self.mask_padding,
            sample_weight=batch.get("sample_weight"),
            reduce=reduce,
        )


class BeatValidation:
    """Score an autoencoder on beats: the mean over records and usable leads of the error over that of predicting zero.

    Args:
        beats: the records.
        batch_size: beats at a time.
    """

    def __init__(self, beats: Sequence[NetworkBeat], batch_size: int) -> None:
        self.beats, self.batch_size = beats, batch_size

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return ``reconstruction_loss``, that error, and ``explained``, 1 minus it."""
        _, errors = reconstruct(model, self.beats, self.batch_size)
        error = float(np.nanmean(errors, axis=1).mean())
        return {"explained": 1.0 - error, "reconstruction_loss": error}


def train(recipe: EcgPretrainingRecipe, out: Path, **options: Unpack[RunOptions]) -> Path | None:
    """Run a recipe from its records to ``out/report.md``, and return that path (None on all ranks but the first).

    The autoencoder is in ``out/best``.

    Args:
        recipe: what to do.
        out: the run's folder.
        options: see `RunOptions`; ``parts`` are the parts of the records that the report shows.

    Raises:
        OutputFolderError: ``out`` is in use, or holds another run.
        DataError: there are no records to train on, or a pattern names none.
        MissingExtra: wfdb, scipy or matplotlib is not installed.
        CheckpointError, NumericError, Interrupted: see `fit`.
    """
    out = Path(out)
    resume, force = options.get("resume", False), options.get("force_resume", False)
    overwrite = options.get("overwrite", False)
    check_extras()
    recipe.data.require_reader()
    with ExitStack() as claimed:
        with open_world(recipe.training.device) as world:
            with world.raise_on_any_rank():
                goes_on = resume or force
                claimed.enter_context(claim_run_folder(out, recipe, resume=goes_on, overwrite=overwrite, force=force))
            with world.raise_on_any_rank():
                model = build_network(recipe)
                recipe = replace(recipe, network=model.config)
                beats = prepare_beats(recipe)
            further = {name: options.get(name, ()) for name in ("loggers", "command")}
            fit_network(model, recipe, beats, out, resume=resume, force_resume=force, **further)
        if not world.is_main:
            return None
        best = EcgAutoencoder.from_pretrained(out / "best").to(next(model.parameters()).device)
        compilation = compilation_of(out)
        with noted_results(out, compilation=compilation and asdict(compilation)):
            return write_ecg_report(
                out,
                best,
                beats.parts,
                beats.left_out,
                validated_on=beats.validated_on,
                shown=options.get("parts", ("test",)),
                title=f"ECG autoencoder on {Path(recipe.data.root).name}",
                facts=_facts(recipe) | describe_compilation(out),
                command=options.get("command", ()),
                earlier=earlier_commands(out),
            )


def _facts(recipe: EcgPretrainingRecipe) -> dict[str, str]:
    return {
        "Started from": "random weights" if recipe.init is None else f"the autoencoder in {Path(recipe.init).name}",
        "Augmentation": f"each lead hidden with probability {recipe.lead_masking:g}; up to {recipe.mixing:.0%} of "
        "another record mixed in",
        **describe_training(recipe.training),
        "Loss": f"mean squared error over usable leads, {'without' if recipe.mask_padding else 'with'} the padding",
        "Leads": SCALING_WORDS[recipe.network.lead_scaling],
        "Median beat": f"of at least {recipe.data.min_beats} heart beats",
    }


def build_network(recipe: EcgPretrainingRecipe) -> EcgAutoencoder:
    """Make the recipe's network, or load the one that it starts from.

    Raises:
        CheckpointError: there is none, it is damaged, for other beats, or not the one that the recipe describes.
    """
    if recipe.init is None:
        return EcgAutoencoder(recipe.network)
    model = EcgAutoencoder.from_pretrained(recipe.init)
    if recipe.network not in (EcgAutoencoderConfig(), model.config):
        raise CheckpointError(f"{recipe.init}: holds {model.config}, not {recipe.network}; leave network to init")
    if model.config.time_steps != BEAT_STEPS:
        raise CheckpointError(f"{recipe.init}: is for beats of {model.config.time_steps} samples, not {BEAT_STEPS}")
    return model


def prepare_beats(recipe: EcgPretrainingRecipe) -> PreparedBeats:
    """Read the records of each part down to their beats.

    Raises:
        DataError: there are none to train on.
        MissingExtra: wfdb or scipy is not installed.
    """
    options: dict[str, Any] = {"min_beats": recipe.data.min_beats, "scaling": recipe.network.lead_scaling}
    read = {part: load_beats(found, **options) for part, found in recipe.data.sources().items()}
    left_out = {part: missed for part, (_, missed) in read.items()}
    if not read["train"][0]:
        reasons = "; ".join(f"{record.record}: {record.reason}" for record in left_out["train"][:3])
        raise DataError(recipe.data.root, "training records", got=f"none that can be used ({reasons})", want="a beat")
    return PreparedBeats({part: found for part, (found, _) in read.items()}, left_out)


def fit_network(
    model: EcgAutoencoder, recipe: EcgPretrainingRecipe, beats: PreparedBeats, out: Path, **options: Any
) -> FitResult:
    """Train a network on prepared beats; ``options`` are those of `fit`."""
    return fit(
        model,
        BeatDataset(
            beats.parts["train"],
            lead_masking=recipe.lead_masking,
            mixing=recipe.mixing,
            scaling=recipe.network.lead_scaling,
        ),
        recipe.training,
        out,
        loss=ReconstructionLoss(recipe.mask_padding),
        forward=lambda network, batch: network(batch["ecg"]),
        validate=BeatValidation(beats.parts[beats.validated_on], recipe.training.batch_size),
        run_config={
            "architecture": EcgAutoencoder.architecture,
            **describe_run(recipe),
            DIGESTS: {
                beat.record: hashlib.sha256(beat.ecg.numpy().tobytes()).hexdigest()[:16]
                for part in dict.fromkeys(("train", beats.validated_on))
                for beat in beats.parts[part]
            },
        },
        config_type=type(recipe),
        **options,
    )
