"""What every layout declares: found by the list, told by its files, its options refused everywhere else."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Literal, get_type_hints

import pytest

from trifuse.architectures.data import layouts
from trifuse.architectures.data.layouts import LAYOUTS
from trifuse.architectures.data.layouts.cohort_options import (
    COHORT_OPTIONS,
    LAYOUT_OPTION,
    CohortOptions,
    cohort_arguments,
    image_arguments,
)
from trifuse.architectures.data.layouts.export import WRITERS
from trifuse.architectures.data.layouts.layout import Layout, Option
from trifuse.architectures.data.layouts.open_cohort import layout_of, open_cohort
from trifuse.kernels.errors import DataError

NAMES = [layout.name for layout in LAYOUTS]
OWNED = [(layout, option) for layout in LAYOUTS for option in layout.options]


def test_every_file_with_a_layout_is_in_the_list():
    files = Path(layouts.__file__).parent.glob("[a-z]*.py")
    declared = {
        name: layout
        for name in (path.stem for path in files)
        if isinstance(layout := getattr(import_module(f"{layouts.__name__}.{name}"), "LAYOUT", None), Layout)
    }
    assert sorted(declared) == sorted(NAMES)
    assert all(declared[layout.name] is layout for layout in LAYOUTS)


def test_layouts_of_the_command_are_those_of_the_library():
    assert LAYOUT_OPTION.keywords["choices"] == ("auto", *NAMES)


def test_the_list_is_read_by_the_command_without_heavy_packages():
    code = (
        "import sys, trifuse.architectures.data.layouts.cohort_options; "
        "print([name for name in ('torch', 'numpy', 'nibabel') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_what_can_be_written_has_a_writer():
    assert sorted(WRITERS) == sorted(layout.name for layout in LAYOUTS if layout.export is not None)


def test_an_unknown_folder_is_told_what_each_layout_looks_like(tmp_path):
    with pytest.raises(DataError) as caught:
        layout_of(tmp_path)
    for layout in LAYOUTS:
        assert f"{layout.signs} ({layout.name})" in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_a_folder_that_is_said_to_have_a_layout_is_told_what_it_lacks(tmp_path, layout):
    assert layout_of(tmp_path, layout.name) is layout
    with pytest.raises(DataError) as caught:
        open_cohort(tmp_path, layout.name)
    if layout.name not in ("nnunet", "lge_ecg"):  # which miss a file before they look for cases
        assert f"cases: expected {layout.lacking}, got 0 cases" in str(caught.value)


@pytest.mark.parametrize(("owner", "option"), OWNED, ids=[option.name for _, option in OWNED])
def test_options_of_a_layout_are_refused_in_others(tmp_path, put_case, owner, option):
    put_case("a")
    choices = [value for value in option.keywords.get("choices", ("3",)) if value != option.default]
    with pytest.raises(
        DataError, match=f"{option.name}: expected none: it belongs to the {owner.name} layout, this is"
    ):
        open_cohort(tmp_path, **{option.name: choices[0]})
    assert open_cohort(tmp_path, **{option.name: option.default}).layout == "plain"
    assert open_cohort(tmp_path, **{option.name: None}).layout == "plain"


def test_options_that_no_layout_has(tmp_path, put_case):
    put_case("a")
    with pytest.raises(TypeError, match=r"expected some of layout, .*frames.*, got phase$"):
        open_cohort(tmp_path, phase="ed")


def test_fixed_classes_take_no_targets(tmp_path, put_synapse):
    put_synapse()
    with pytest.raises(DataError, match="the classes of the synapse layout are fixed"):
        open_cohort(tmp_path, targets=["liver=1"], label_space="btcv14")


def test_an_option_is_a_flag_and_a_field():
    parser = argparse.ArgumentParser()
    for option in COHORT_OPTIONS:
        option.add_to(parser)
    said = parser.parse_args(["--target", "lv=3", "--target", "2", "--max-interval", "3", "--channel", "T1"])
    assert cohort_arguments(said) == {"targets": ["lv=3", "2"], "max_interval_days": 3.0, "channel": "T1"}
    assert image_arguments(said) == {"channel": "T1"}
    defaults = {option.name: option.default for option in COHORT_OPTIONS}
    assert vars(CohortOptions()) == defaults
    hints = get_type_hints(CohortOptions)
    assert hints["targets"] == tuple[str, ...]
    assert hints["frames"] == Literal["both", "ed", "es"]
    assert hints["label_space"] == Literal["btcv14", "transunet9", "merit9"] | None
    assert hints["max_interval_days"] == float | None


def test_an_option_may_have_further_flags():
    parser = argparse.ArgumentParser()
    Option("data.slices", "--slices", "which", {"choices": ("all", "none")}, default="all", aliases=("--keep",)).add_to(
        parser
    )
    assert parser.parse_args(["--keep", "none"]).slices == parser.parse_args(["--slices", "none"]).slices == "none"
    assert parser.parse_args([]).slices is None
