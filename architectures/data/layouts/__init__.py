"""Every layout that a cohort's folder may have: one file for each, and one line here, in the order of detection."""

from __future__ import annotations

from . import acdc, acdc_slices, lascarqs, lge_ecg, nnunet, plain, synapse
from .layout import Layout

LAYOUTS: tuple[Layout, ...] = (
    lge_ecg.LAYOUT,
    nnunet.LAYOUT,
    plain.LAYOUT,
    synapse.LAYOUT,
    acdc.LAYOUT,
    acdc_slices.LAYOUT,
    lascarqs.LAYOUT,
)
