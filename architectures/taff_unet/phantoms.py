"""The synthetic cohorts that a demo and an ablation are run on, and how large networks and trainings are for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trifuse.architectures.storage.text import read_text
from trifuse.kernels import DataError

if TYPE_CHECKING:
    from trifuse.architectures.data.layouts.split import Split

Phantom = Literal["easy", "ambiguous"]
COHORT_FOLDER = "phantom"


@dataclass(frozen=True)
class Plan:
    """A phantom, and trainings on it that a CPU can afford.

    Attributes:
        phantom: ``"easy"``: one scar, and sometimes an artefact beside it; ``"ambiguous"``: always two candidates, see
            `trifuse.architectures.data.phantoms.ambiguous`.
        parts: cases that train, validate and test.
        image_size: pixels of a slice's side,
        slices: and slices of a case.
        fusion_stage: stage of the network behind which the ECG joins.
        base_dim: channels of its first stage.
        epochs: of each training,
        samples_per_epoch: each of so many patches, in batches of four.
        first_pass_epochs: of each training of the first pass,
        folds: of which there is one more than this.
        ecg_epochs: of the ECG autoencoder,
        ecg_batch_size: beats per step of it.
        seeds: repetitions of a row of the ablation.
    """

    phantom: Phantom = "easy"
    parts: tuple[int, int, int] = (26, 4, 10)
    image_size: int = 96
    slices: int = 8
    fusion_stage: int = 3
    base_dim: int = 8
    epochs: int = 6
    samples_per_epoch: int = 280
    first_pass_epochs: int = 4
    folds: int = 2
    ecg_epochs: int = 15
    ecg_batch_size: int = 8
    seeds: int = 3

    @property
    def cases(self) -> int:
        """How many cases there are."""
        return sum(self.parts)

    def of_cases(self, cases: int | None) -> Plan:
        """Return the plan with so many cases, its parts in proportion; None leaves them as they are.

        Raises:
            DataError: none of so few is left to test on.
        """
        if cases is None:
            return self
        val, test = (round(cases * part / self.cases) for part in self.parts[1:])
        if test < 1:
            least = self.cases // (2 * self.parts[2]) + 1
            hint = f"ask for {least} or more"
            raise DataError("phantom", "test cases", got=f"none of {cases}", want="at least one", hint=hint)
        return replace(self, parts=(cases - val - test, val, test))

    def write(self, folder: Path, seed: int = 0, *, keep: bool = False) -> Path:
        """Write the cohort below ``folder``, and return its path.

        Args:
            folder: is made where there is none.
            seed: of the phantom.
            keep: leave a cohort alone that is there already.

        Raises:
            DataError: one that is to be kept is of another kind, or has another number of cases.
        """
        from trifuse.architectures.data.layouts.lge_ecg import TABLE
        from trifuse.architectures.data.phantoms.ambiguous import TRUTH, AmbiguousPhantom, write_ambiguous_phantom
        from trifuse.architectures.data.phantoms.scar import write_scar_phantom

        cohort, (train, val, test) = folder / COHORT_FOLDER, self.parts
        size = (self.image_size, self.image_size, self.slices)
        if keep and (cohort / TABLE).exists():  # it is written last
            found = len(read_text(cohort / TABLE).splitlines()) - 1
            kind: Phantom = "ambiguous" if (cohort / TRUTH).exists() else "easy"
            if kind != self.phantom:
                hint = "choose another folder, or ask for that one"
                raise DataError(cohort, "phantom", got=kind, want=f"{self.phantom}, as asked for", hint=hint)
            if found != self.cases:
                hint = "choose another folder, or ask for as many cases"
                raise DataError(cohort, "cases", got=found, want=f"{self.cases}, as asked for", hint=hint)
        elif self.phantom == "easy":
            write_scar_phantom(cohort, self.cases, seed, size, val=val, test=test)
        else:
            write_ambiguous_phantom(cohort, AmbiguousPhantom(train, val, test, size, seed=seed))
        return cohort


def write_ambiguous(out: Path, *, size: Sequence[int], **wishes: Any) -> Split:
    """Write the ambiguous phantom of that size, with further fields of `AmbiguousPhantom`, and return its split.

    Raises:
        ValueError: see `AmbiguousPhantom`; nothing is written then.
    """
    from trifuse.architectures.data.phantoms.ambiguous import AmbiguousPhantom, write_ambiguous_phantom

    columns, rows, slices = size
    return write_ambiguous_phantom(out, AmbiguousPhantom(size=(columns, rows, slices), **wishes))


AMBIGUOUS = Plan(
    "ambiguous",
    parts=(220, 20, 60),
    image_size=64,
    slices=6,
    fusion_stage=1,  # a map of 32 x 32: on smaller ones the padding is heard more than the ECG
    epochs=5,
    samples_per_epoch=640,
    first_pass_epochs=3,
    ecg_epochs=10,
    ecg_batch_size=32,
    seeds=5,
)
DEMOS: dict[Phantom, Plan] = {"easy": Plan(), "ambiguous": AMBIGUOUS}
ABLATIONS: dict[Phantom, Plan] = {
    "easy": Plan(parts=(40, 8, 24), epochs=12, samples_per_epoch=320, first_pass_epochs=6, ecg_epochs=30),
    "ambiguous": AMBIGUOUS,
}
