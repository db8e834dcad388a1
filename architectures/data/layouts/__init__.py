"""The layouts that a cohort's folder may have: the one list of them."""

from __future__ import annotations

from importlib import import_module

from .layout import Layout

_FILES = (  # each a file beside this one that declares a LAYOUT, in the order of detection
    "lge_ecg",
    "nnunet",
    "plain",
    "synapse",
    "acdc",
    "acdc_slices",
    "lascarqs",
)

LAYOUTS: tuple[Layout, ...] = tuple(import_module(f"{__name__}.{file}").LAYOUT for file in _FILES)
