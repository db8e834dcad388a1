"""What papers report of a plain U-Net as their baseline, as data."""

from __future__ import annotations

from trifuse.architectures.evaluation.protocols import nnunet_protocol
from trifuse.architectures.evaluation.report import PaperTable

PAPER = "Isensee et al., nnU-Net, Nature Methods 2021, as the baseline of the papers named with the tables"
PROTOCOL = nnunet_protocol(
    ("dsc", "iou"),
    "nnU-Net's own evaluation leaves a class that is absent from truth and prediction out of the mean, and has no "
    "HD95; the papers that take it as their baseline do not say what they do.",
)
LEFT_ATRIUM = PaperTable(
    "Paper-reported: LAScarQS 2022, 12 test patients, %",
    ("Model", "DSC", "IoU"),
    (("nnU-Net 2D", "87.7 ± 2.7", "81.7 ± 2.8"),),
    "The baseline of the paper on left-atrium segmentation with a frozen DINOv2 and weighted block fusion.",
)
SCAR = PaperTable(
    "Paper-reported: scar, 21 test cases",
    ("Model", "Modality", "Dice", "Precision", "Sensitivity", "Volume difference"),
    (("baseline", "LGE", "0.6149", "0.7315", "0.7072", "4.436"),),
    "The baseline of the paper on ECG- and AHA-17-guided scar segmentation; the unit of the volume difference is not "
    "stated.",
)


def paper_tables(targets: int) -> list[PaperTable]:
    """Return what papers report of their baseline for a cohort of as many targets."""
    return [table for table, wanted in ((LEFT_ATRIUM, 1), (SCAR, 3)) if wanted == targets]
