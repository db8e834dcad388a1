"""The settings of TAFF-UNet: which inputs the network has beside the image, as in the paper's table."""

from __future__ import annotations

PRIOR, ECG, TIME = "prior", "ecg", "time"
SETTINGS: dict[str, frozenset[str]] = {
    "baseline": frozenset(),
    "ap": frozenset({PRIOR}),
    "ecg": frozenset({ECG}),
    "ecg_time": frozenset({ECG, TIME}),
    "ecg_ap": frozenset({PRIOR, ECG}),
    "full": frozenset({PRIOR, ECG, TIME}),
}
