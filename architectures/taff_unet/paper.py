"""What the paper on TAFF-UNet reports, as data: a table to be compared with, what it leaves open beside it."""

from __future__ import annotations

from collections.abc import Sequence

from trifuse.architectures.evaluation.protocols import nnunet_protocol
from trifuse.architectures.evaluation.report import PaperTable

PAPER = "the paper on ECG- and AHA-17-guided scar segmentation with temporal-aware feature fusion"
PROTOCOL = nnunet_protocol(
    ("dsc", "precision", "sensitivity", "volume_difference"),
    "The paper reports Dice, precision, sensitivity and volume difference of the scar, and does not say what a score "
    "is where a mask is empty, nor the unit of the volume difference. It is built on nnU-Net, whose rule for empty "
    "masks stands here beside the strict one; volume differences are in mL without a sign in both.",
)

RESULTS = PaperTable(
    "Paper-reported: scar, 21 test cases",
    ("Model", "Modality", "AP", "Dice", "Precision", "Sensitivity", "Volume difference"),
    (
        ("baseline", "LGE", "no", "0.6149", "0.7315", "0.7072", "4.436"),
        ("ablation", "LGE+ECG, no time", "no", "0.5916", "0.7351", "0.6398", "6.256"),
        ("ablation", "LGE+ECG, no time", "yes", "0.8234", "0.8234", "0.8900", "2.039"),
        ("ablation", "LGE", "yes", "0.8204", "0.9090", "0.8408", "2.196"),
        ("ours", "LGE+ECG, time", "yes", "0.8463", "0.9115", "0.9043", "1.971"),
    ),
    "AP is the AHA-17 prior; the paper does not say whether at test time it was built from the reference annotation. "
    "The unit of the volume difference is not stated. One row's Dice and precision agree to four digits.",
)


def paper_tables(targets: int) -> Sequence[PaperTable]:
    """Return the paper's results, which are for the scar."""
    return [RESULTS]
