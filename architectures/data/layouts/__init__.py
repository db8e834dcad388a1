"""The layouts that a cohort's folder may have: the one list of them.

<layout>.py    one layout each; layout.py, found.py and cohort.py: what a layout declares, finds and results in
open_cohort.py, read_case.py, split.py, check.py, export.py    open, read, split, check and write a cohort
cohort_options.py    the options of all layouts; nnunet_grids.py, nnunet_json.py: parts of nnunet.py
"""

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
