"""How much memory the prediction of a case takes at most, known before its voxels are read.

What lies in memory at once is added up for each stage: reading the image, scaling and resampling it, the network, and
writing the label map. Sizes of arrays follow from the header. What the network holds follows from its operators, which
are run on shapes without values.
"""

from __future__ import annotations

import math
import resource
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trifuse.architectures.data.layouts.cohort import Case
from trifuse.architectures.data.layouts.read_case import image_size
from trifuse.architectures.data.samples.preprocessing import Preprocessing, patches_and_spacing
from trifuse.architectures.data.samples.resampling import plane_size
from trifuse.architectures.data.samples.volume_to_slices import network_input
from trifuse.architectures.data.volumes.volume import StoredSize
from trifuse.architectures.storage.text import listed
from trifuse.kernels import DataError, TrifuseError
from trifuse.kernels.torch_internals import TorchDispatchMode, computing_shapes_alone

from .inference import evaluating
from .sliding_window import MIRRORINGS, Windows

_GIB = 1 << 30
LIBRARIES_BYTES = 96 << 20  # what SciPy, h5py and oneDNN's programs take when they are used for the first time
_FRAGMENTED = 1.5  # what the C library holds for every byte of tensors that come and go
_FLOAT, _DOUBLE = 4, 8
_SLICES_AT_ONCE = 16  # whose values are scaled in float64
_REORDERING = ("convolution", "mm", "linear", "attention")  # operators that may copy their tensors into another order


def batch_sizes_within(
    max_ram: int | None,
    model: nn.Module,
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    batch_size: int,
    inputs: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, int]:
    """Return for each case the largest batch, up to ``batch_size``, with which its prediction fits into memory.

    A note on stderr names the cases with a smaller one.

    Args:
        max_ram: bytes that this process may take in all, the network and what else it holds already included. On a GPU
            the network's own computations take none of them. None grants whatever is needed.
        model: on the device where it will run.
        cases: to be predicted, one after the other. Those whose header cannot be read get ``batch_size``: the error
            comes when they are read.
        preprocessing: as in training.
        batch_size: slices or windows at a time, as asked for.
        inputs: shape, without the batch, of what the network takes beside images.

    Raises:
        DataError: cases that do not fit even one slice or window at a time, with what they need.
    """
    sizes, problems = dict.fromkeys((case.case_id for case in cases), batch_size), []
    if max_ram is None:
        return sizes
    stored = {case.case_id: found for case in cases if (found := _size_or_none(case)) is not None}
    network = NetworkNeed(model, preprocessing, inputs or {})
    priors = sum(math.prod(size.shape) for size in stored.values()) if "prior" in network.inputs else 0
    for case in cases:
        if (size := stored.get(case.case_id)) is None:
            continue
        tried = batch_size
        while (need := network.bytes_for(size, tried) + priors + held_bytes()) > max_ram and tried > 1:
            tried //= 2
        if need > max_ram:
            got = f"{_gib(need)} for {' x '.join(map(str, size.shape))} voxels, one slice at a time"
            want, hint = f"at most {_gib(max_ram, math.floor)} (max_ram)", "grant that much, or leave the case out"
            problems.append(DataError(case.image, "memory that its prediction takes", got=got, want=want, hint=hint))
        sizes[case.case_id] = tried
    if problems:
        raise DataError.merge(problems)
    if smaller := [f"{case_id} ({size})" for case_id, size in sizes.items() if size < batch_size]:
        print(f"note: smaller batches, for the memory granted: {listed(smaller)}", file=sys.stderr)
    return sizes


def _gib(size: int, rounded: Callable[[float], int] = math.ceil) -> str:
    return f"{rounded(size / _GIB * 100) / 100:.2f} GiB"


def _size_or_none(case: Case) -> StoredSize | None:
    try:
        return image_size(case)
    except (DataError, OSError):
        return None


def held_bytes() -> int:
    """Return what this process takes without a case: now, as far as the system tells, and with libraries to come."""
    try:
        now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return now + LIBRARIES_BYTES


# ------------------------------------------------------------------------------------------------ the stages of a case


def _reading_bytes(size: StoredSize, preprocessing: Preprocessing) -> int:
    """The file decompressed, its values as float64 where they are scaled, as float32, and these as they are shown."""
    voxels, content = math.prod(size.shape), size.stored_bytes * 9 // 8  # a growing buffer is a little ahead
    true = _DOUBLE * voxels if size.scaled else 0
    replaced = 0 if preprocessing.nonfinite == "error" else 2 * _FLOAT * voxels
    return max(content + 2 * true, content + true + _FLOAT * voxels, 2 * _FLOAT * voxels + voxels + replaced)


def _scaling_bytes(shape: Sequence[int], preprocessing: Preprocessing) -> int:
    """A sorted copy for percentiles, or values and deviations in float64; and a few slices in float64."""
    voxels, plane = math.prod(shape), math.prod(shape[1:])
    whole = 0 if preprocessing.clip_percentiles is None else _FLOAT * voxels
    if preprocessing.intensity == "zscore":
        whole = _DOUBLE * voxels * (1 if preprocessing.clip_percentiles is None else 2)
    return max(whole, min(_SLICES_AT_ONCE, shape[0]) * plane * (3 * _DOUBLE + _FLOAT))


def _whole_slices(
    size: StoredSize, preprocessing: Preprocessing, network: NetworkNeed, batch_size: int, scaling: int
) -> tuple[int, int]:
    """Return what preparing the slices takes beside the image, and what predicting them takes."""
    depth, *plane = size.shape
    side = preprocessing.image_size
    slices = _FLOAT * depth * side * side
    resized = min(_SLICES_AT_ONCE, depth) * _FLOAT * (side * side + side * plane[1] + math.prod(plane))
    labels = math.prod(size.shape) if preprocessing.restore == "logits" else depth * side * side
    batch = min(batch_size, depth)
    taken, maps, _ = network.run(batch, side)
    restored = 0 if preprocessing.restore == "logits" else math.prod(size.shape)
    # The maps of a batch are held until those of the next are there, and then looked through.
    predicted = slices + labels + max(taken + 2 * maps + batch * math.prod(plane), restored)
    return slices + scaling + resized, predicted


def _windows(
    size: StoredSize, preprocessing: Preprocessing, network: NetworkNeed, batch_size: int, scaling: int
) -> tuple[int, int]:
    """Return what resampling the slices takes beside the image, and what predicting them by windows takes."""
    patches, spacing_mm = patches_and_spacing(preprocessing)
    depth, voxels, side = size.shape[0], math.prod(size.shape), preprocessing.image_size
    plane = plane_size(size.shape[1:], size.spacing_mm[1:], spacing_mm)
    windows = Windows(plane, side, patches.step)
    resampled = _FLOAT * depth * math.prod(plane)
    splines = 2 * _DOUBLE * (math.prod(plane) + math.prod(size.shape[1:]))
    prepared = max(2 * voxels, _FLOAT * voxels + max(scaling, 2 * resampled + splines))
    count = len(windows.squares)
    at_once = max(1, batch_size // count)
    taken, maps, classes = network.run(min(batch_size, at_once * count), side)
    mirrorings = len(MIRRORINGS) if patches.mirror else 1
    cut = at_once * (count * side * side + math.prod(windows.padded))
    if "prior" in network.inputs:
        cut, resampled = 2 * cut, resampled + depth * math.prod(plane)
    found = _FLOAT * classes * at_once * count * side * side
    joined = found + 5 * _FLOAT * classes * at_once * math.prod(windows.padded)
    batch = taken + (2 * mirrorings + 1) * maps
    return prepared, resampled + voxels + _FLOAT * cut + found + max(batch, joined) + at_once * voxels // depth


def _dividing_bytes(voxels: int) -> int:
    """Labels and their bodies, counted: dividing a heart into segments."""
    return voxels * (2 + _FLOAT + 2 * _DOUBLE)


def _writing_bytes(voxels: int) -> int:
    """Label maps of 8 bits: the classes, in their type, as bytes, compressed, and read back."""
    return 5 * voxels + voxels // 8


# ------------------------------------------------------------------------------------------------------- the network


class _Taken(NamedTuple):
    """What a batch takes on a CPU: bytes at once, bytes of the logits that come out, and their classes."""

    at_once: int
    maps: int
    classes: int


class NetworkNeed:
    """A network, and the memory that predictions with it take.

    Its own is told by running it without values, once for each size of a batch.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, inputs: Mapping[str, Sequence[int]]) -> None:
        self.inputs = inputs
        self._model, self._preprocessing = model, preprocessing
        self._found: dict[int, _Taken] = {}

    def bytes_for(self, size: StoredSize, batch_size: int) -> int:
        """Return the most bytes that a case takes at any moment, beyond what is held before.

        Raises:
            TrifuseError: see `run`.
        """
        preprocessing, voxels = self._preprocessing, math.prod(size.shape)
        image, scaling = _FLOAT * voxels, _scaling_bytes(size.shape, preprocessing)
        predict = _whole_slices if preprocessing.patches is None else _windows
        prepared, predicted = predict(size, preprocessing, self, batch_size, scaling)
        divided = _dividing_bytes(voxels) if "prior" in self.inputs else 0
        later = max(prepared, predicted, _writing_bytes(voxels), divided)
        return max(_reading_bytes(size, preprocessing), image + later)

    def run(self, batch: int, side: int) -> _Taken:
        """Return what a batch of images of that side takes.

        Raises:
            TrifuseError: the network cannot be run without values.
        """
        if batch not in self._found:
            self._found[batch] = self._run(batch, side)
        return self._found[batch]

    def _run(self, batch: int, side: int) -> _Taken:
        compute: Any = self._model
        if self._preprocessing.patches is None:
            compute = getattr(self._model, "head_maps", self._model)
        with evaluating(self._model) as device, torch.inference_mode(), computing_shapes_alone(), _Held() as held:
            image = network_input(torch.empty(batch, side, side), self._preprocessing).to(device)
            inputs = {name: torch.empty(batch, *shape, device=device) for name, shape in self.inputs.items()}
            try:
                maps = compute(image, **inputs)
            except Exception as error:
                raise TrifuseError(
                    f"max_ram: the memory of {type(self._model).__name__} cannot be told without running it ({error}); "
                    "expected a network whose operators depend on shapes alone; leave out max_ram"
                ) from error
        maps = [maps] if isinstance(maps, Tensor) else list(maps)
        size = sum(_FLOAT * one.numel() for one in maps)
        classes = max(2, maps[0].shape[1])
        on_host = device.type == "cpu"
        return _Taken(on_host * int(_FRAGMENTED * held.most), size * classes // maps[0].shape[1], classes)


class _Held(TorchDispatchMode):
    """Follows the bytes that are held by the tensors that operators return, and the copies that operators may make."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returned = _tensors(result)
        for tensor in returned:
            self._hold(tensor)
        copied = 0
        if any(word in func.__name__ for word in _REORDERING):
            copied = sum(tensor.numel() * tensor.element_size() for tensor in (*_tensors(args), *returned))
        self.most = max(self.most, self._now + copied)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self._known:
            self._known.add(id(storage))
            self._now += storage.nbytes()
            weakref.finalize(storage, self._release, id(storage), storage.nbytes())

    def _release(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self._now -= size


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []
