"""Prediction with a finished network: load it from its folder, whatever its architecture, and segment images."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from trifuse.architectures.data.layouts import LAYOUTS
from trifuse.architectures.data.layouts.cohort_options import image_arguments
from trifuse.architectures.data.layouts.open_cohort import open_images
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.data.volumes.files import NonFinite
from trifuse.architectures.evaluation.memory_need import batch_sizes_within
from trifuse.architectures.evaluation.predict import predict_cases
from trifuse.architectures.storage.config_json import config_from_json
from trifuse.architectures.storage.pretrained import CONFIG_FILE, read_description
from trifuse.architectures.training.distributed import choose_device
from trifuse.kernels import CheckpointError, DataError
from trifuse.kernels.errors import require

from .folder import network_folder, run_of, run_section
from .recipes import DataRecipe, RecipeError
from .registry import NETWORKS, experiment


def load_network(folder: Path) -> tuple[Any, DataRecipe]:
    """Return the network of a run, or of a folder that ``save_pretrained`` wrote, and how its slices were prepared.

    That is what the run says, also for the folders of networks in it, such as ``best``; without a run, what the
    converter of a published network found beside its weights, or else what the architecture does by default.

    Raises:
        CheckpointError: the folder holds no network written by trifuse, a damaged one, or one whose images were
            prepared in a way that trifuse lacks.
    """
    run, weights = run_of(folder), network_folder(folder)
    description = read_description(weights)
    architecture = description.get("architecture")
    if architecture not in NETWORKS:
        raise CheckpointError(f"{weights}: unknown architecture {architecture!r}; known are {', '.join(NETWORKS)}")
    known = experiment(architecture)
    network = known.load(known.network).from_pretrained(weights)
    if run:
        return network, run_section(run, "data", DataRecipe)
    data = known.load(known.recipe)().data
    if (said := description.get("preprocessing")) is not None:
        return network, replace(data, preprocessing=_published_preprocessing(said, weights))
    size = getattr(network.config, "image_size", data.preprocessing.image_size)
    return network, data.with_preprocessing(image_size=size)


def _published_preprocessing(said: Any, weights: Path) -> Preprocessing:
    try:
        return config_from_json(Preprocessing, said, weights / CONFIG_FILE)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; trifuse cannot prepare images as this network's training did") from error


def predict_images(
    model_folder: Path,
    images: Path,
    out: Path,
    *,
    image_size: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    nonfinite: NonFinite = "error",
    window: tuple[float, float] | None = None,
    prior_labels: Path | None = None,
    spacing_mm: tuple[float, float] | None = None,
    frame: int | None = None,
    max_ram: int | None = None,
) -> list[Path]:
    """Segment a NIfTI file, a folder of them, or the images of a cohort; return the paths of the label maps.

    Args:
        model_folder: see `load_network`.
        images: see `open_images`.
        out, batch_size, nonfinite: see `predict_cases`.
        image_size: side of the network's input in pixels; None takes the run's.
        device: see `choose_device`.
        window: intensities are clipped to it and scaled to [0, 1], in place of the run's own scaling. A network that
            was trained on images prepared by others, such as Synapse's, needs it for images in Hounsfield units.
        prior_labels: folder of ``<case>.nii.gz`` to build an anatomical prior from, for networks that take one; None
            predicts them by the run's own first pass, into ``first_pass`` below ``out``.
        spacing_mm: distance of rows and of columns that images are resampled to, for a network on patches whose run,
            which records it, is missing.
        frame: of images of four dimensions, the frame to segment, counted from 0.
        max_ram: bytes of memory that this process may take: see `batch_sizes_within`.

    Raises:
        RecipeError: the window's lowest value is not below its highest, or a spacing is no length.
        CheckpointError: the spacing that a network on patches was trained at is unknown.
        DataError: prior labels for a network that takes no prior; cases that need more memory; see `predict_cases`.
    """
    if window is not None:
        _with_window(Preprocessing(), window)  # refused before anything is loaded
    model, data = load_network(model_folder)
    preprocessing = _with_spacing(model_folder, data.preprocessing, spacing_mm)
    preprocessing = replace(preprocessing, nonfinite=nonfinite, image_size=image_size or preprocessing.image_size)
    if preprocessing.resize == "cubic" or preprocessing.patches is not None:
        require("scipy", "med", "resampling slices")
    cohort = open_images(images, **image_arguments(data), frame=frame)
    if window is not None:
        preprocessing = _with_window(preprocessing, window)
    elif preprocessing.intensity == "as_is" and cohort.has_spacing:
        print(_note_of_values_as_they_are(), file=sys.stderr)
    model.to(choose_device(device))
    known = experiment(model.architecture)
    bring = known.load(known.prediction_inputs)
    if bring is None and prior_labels is not None:
        raise DataError(prior_labels, "prior labels", got=model.architecture, want="a network that takes a prior")
    shapes = known.load(known.input_shapes, lambda config, side: {})(model.config, preprocessing.image_size)
    sizes = batch_sizes_within(max_ram, model, cohort.cases, preprocessing, batch_size, shapes)
    side_inputs = bring and bring(
        model,
        run_of(model_folder),
        cohort,
        out,
        prior_labels=prior_labels,
        batch_size=batch_size,
        max_ram=max_ram,
    )
    return predict_cases(
        model,
        cohort,
        [case.case_id for case in cohort.cases],
        out,
        preprocessing,
        side_inputs=side_inputs,
        batch_size=sizes,
    )


def _with_window(preprocessing: Preprocessing, window: tuple[float, float]) -> Preprocessing:
    try:
        return replace(preprocessing, intensity="window", window=window, percentiles=None)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _note_of_values_as_they_are() -> str:
    """Say that a network takes values as they lie in files, and what to do where its own were prepared by others."""
    windows = {layout.name: layout.prepared_window_hu for layout in LAYOUTS if layout.prepared_window_hu is not None}
    remedies = (f"were of the {name} layout, pass --window {low:g} {high:g}" for name, (low, high) in windows.items())
    return (
        "note: this network was trained on values as they lie in its files, and takes these images so, too; if they "
        f"are in Hounsfield units and its files {', or '.join(remedies)}"
    )


def _with_spacing(
    model_folder: Path, preprocessing: Preprocessing, spacing_mm: tuple[float, float] | None
) -> Preprocessing:
    """Return the preprocessing with the spacing of its patches, if it has any, which is the run's or is given."""
    patches = preprocessing.patches
    if spacing_mm is not None:
        if patches is None or patches.spacing_mm is not None:
            known = "takes whole slices" if patches is None else f"was trained at {patches.spacing_mm} mm"
            raise CheckpointError(f"{model_folder}: this network {known}; leave the spacing to it")
        try:
            return replace(preprocessing, patches=replace(patches, spacing_mm=spacing_mm))
        except ValueError as error:
            raise RecipeError(str(error)) from error
    if patches is not None and patches.spacing_mm is None:
        raise CheckpointError(
            f"{model_folder}: there is no run that says at which spacing of rows and columns this network was trained; "
            "pass it, in mm, for example --spacing 1.25 1.25"
        )
    return preprocessing
