"""What the paper on DINO-UNet reports, as data: tables to be compared with, their contradictions beside them."""

from __future__ import annotations

from collections.abc import Sequence

from trifuse.architectures.evaluation.protocols import nnunet_protocol
from trifuse.architectures.evaluation.report import PaperTable

PAPER = "the paper on left-atrium segmentation with a frozen DINOv2 and weighted block fusion"
PROTOCOL = nnunet_protocol(
    ("dsc", "iou"),
    "The paper reports DSC and IoU, and says neither what a score is where a mask is empty nor whether the means are "
    "over volumes or slices. Its baseline is nnU-Net, whose rule for empty masks stands here beside the strict one; "
    "volumes and slices have a section each.",
)
PAPER_TABLES = (
    PaperTable(
        "Paper-reported Table I: LAScarQS 2022, 12 test patients, %",
        ("Model", "DSC", "IoU"),
        (
            ("nnU-Net 2D", "87.7 ± 2.7", "81.7 ± 2.8"),
            ("base", "91.5 ± 6.6", "82.9 ± 9.5"),
            ("large", "92.1 ± 5.6", "83.8 ± 8.4"),
            ("giant", "92.3 ± 5.9", "84.1 ± 8.8"),
        ),
        "DSC and IoU of this table cannot both be means over the same patients: IoU = DSC / (2 - DSC) is convex.",
    ),
    PaperTable(
        "Paper-reported Table II: which blocks, with and without image integration, DSC, %",
        ("Blocks", "Integration", "base", "large", "giant"),
        (
            ("last 4", "yes", "88.1 ± 8.0", "88.6 ± 6.5", "89.8 ± 4.7"),
            ("last 4", "no", "87.1 ± 6.4", "86.6 ± 6.4", "88.2 ± 4.8"),
            ("7,5,3,1", "yes", "88.3 ± 7.8", "88.9 ± 5.8", "90.3 ± 4.3"),
            ("7,5,3,1", "no", "87.7 ± 6.3", "87.2 ± 6.6", "88.5 ± 5.2"),
        ),
    ),
)


def paper_tables(targets: int) -> Sequence[PaperTable]:
    """Return the paper's results, which are for one target."""
    return PAPER_TABLES
