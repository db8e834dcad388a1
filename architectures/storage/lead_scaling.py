"""What the numbers of a beat mean that a network is given: what was done with the voltage of its leads."""

from __future__ import annotations

from typing import Literal

LeadScaling = Literal["zscore", "voltage"]
"""Each lead with mean 0 and standard deviation 1, or about its mean in units that all leads and ECGs have in common."""

VOLTAGE_UNIT_MV = 0.1
"""That unit, a millimetre of ECG paper: over a median beat a lead's standard deviation is of that size."""

SCALING_WORDS: dict[LeadScaling, str] = {
    "zscore": "z-scored for each lead",
    "voltage": f"of {VOLTAGE_UNIT_MV:g} mV about each lead's mean",
}
