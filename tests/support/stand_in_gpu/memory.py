"""Where a tensor lies, and what becomes of that in every operation."""

from __future__ import annotations

import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CPU, META = torch.device("cpu"), torch.device("meta")
_EITHER = torch.device("cpu", 0)  # made inside PyTorch, like a tensor of which nothing is said here: goes along
_ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# What takes tensors from two places: copies, and indices from the host.
_MIXES = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::set_", "aten::_foreach_copy_"}
# What hands a value to the host, and so waits for the GPU.
_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"}
_LARGEST_PRODUCT = 1 << 32  # multiplications; larger ones, which only tell a GPU's speed, sleep
_LARGEST_DRAW = 1 << 25  # numbers; more of them, to be multiplied for that, are zeros
RECORDING = "operation not permitted when stream is capturing"


class Gpus:
    """How many there are, and the one that ``"cuda"`` means."""

    count, current = 1, 0


class Held:
    """Bytes on the GPU, now and at most since it was asked to forget."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage for as long as it lives."""
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        self.now -= size


held = Held()
generators: dict[int, torch.device] = {}  # by the address of what PyTorch passes on of a generator
default_generator = torch.Generator()


def place_of(tensor: Tensor) -> torch.device:
    """Return where a tensor lies."""
    if tensor.is_meta:
        return META
    mark = _mark_of(tensor)
    return mark if mark.type == "cuda" else CPU


def _mark_of(tensor: Tensor) -> torch.device:
    try:
        return getattr(tensor.untyped_storage(), "place", CPU)
    except NotImplementedError:  # it has no storage
        return CPU


def put(tensor: Tensor, place: torch.device) -> Tensor:
    """Say of a tensor with a new storage where it lies."""
    storage = tensor.untyped_storage()
    if getattr(storage, "place", CPU) != place:
        storage.place = place
        if place.type == "cuda":
            held.add(storage)
    return tensor


def placed(device: torch.device | str | int | None) -> torch.device:
    """Return a device with its index."""
    device = CPU if device is None else torch.device(device)
    if device.type != "cuda":
        return device
    index = Gpus.current if device.index is None else device.index
    if index >= Gpus.count:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return torch.device("cuda", index)


class Recording:
    """The operations between the beginning and the end of a capture.

    They run while they are recorded, as only then it is known what follows; on a GPU they do not. What was there before
    therefore gets its values back at the end.
    """

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Sequence[Any], dict[str, Any], list[Tensor], tuple[Any] | None]] = []
        self._seen: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage | None]] = {}

    def keep(self, given: Iterator[Tensor]) -> None:
        """Keep the values of arguments that no recorded operation made."""
        for tensor in given:
            if _address(tensor) not in self._seen:
                storage = tensor.untyped_storage()
                self._seen[_address(tensor)] = storage, storage.clone()

    def add(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], results: list[Tensor]) -> None:
        """Record an operation that was run."""
        self.operations.append((function, args, kwargs, results, MODE.making))
        for tensor in results:
            self._seen.setdefault(_address(tensor), (tensor.untyped_storage(), None))

    def undo(self) -> None:
        """Give what was there before its values back."""
        for storage, values in self._seen.values():
            if values is not None:
                storage.copy_(values)

    def replay(self) -> None:
        """Run them again, into the memory of their first results."""
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), _disable_current_modes():
            for function, args, kwargs, results, making in self.operations:
                MODE.making = making
                again = MODE.run(function, args, kwargs)
                known = {_address(tensor) for tensor in _tensors((args, kwargs))}
                for old, new in zip(results, _tensors(again), strict=True):
                    if _address(new) not in known:
                        torch.ops.aten.copy_(old, new)
        MODE.making = None


class Mode(TorchDispatchMode):
    """Sees every operation, also those of the backward pass."""

    recording: Recording | None = None
    making: tuple[Any] | None = None  # the device that a function of Python which makes tensors was given
    waits_are_said: int | str = 0  # by a warning, as `torch.cuda.set_sync_debug_mode` asks
    inside = 0  # of one of our own operators, which is recorded as a whole

    supports_higher_order_operators = True  # FlexAttention is one

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(function, HigherOrderOperator):
            return self._whole(function, args, kwargs)
        recording = None if self.inside else self.recording
        if recording is not None:
            recording.keep(_tensors((args, kwargs)))
        results = self.run(function, args, kwargs)
        if recording is not None:
            recording.add(function, args, kwargs, list(_tensors(results)))
        return results

    def run(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = function._schema.name
        given = list(_tensors((args, kwargs)))
        place = self._place(name, given, kwargs)
        kwargs = {key: CPU if key == "device" and value is not None else value for key, value in kwargs.items()}
        kwargs |= {"pin_memory": False} if kwargs.get("pin_memory") else {}
        if name == "aten::mm" and args[0].numel() * args[1].shape[1] > _LARGEST_PRODUCT:
            results = args[0].new_empty(len(args[0]), args[1].shape[1])
            time.sleep(results.element_size() / 1e3)
        elif name == "aten::randn" and math.prod(args[0]) > _LARGEST_DRAW:
            results = torch.ops.aten.zeros(args[0])
        elif torch.Tag.nondeterministic_seeded in function.tags:
            results = _drawn(function, args, kwargs, place)
        elif function.namespace == "trifuse":
            results = self._launched(function, args, kwargs)
        else:
            results = function(*args, **kwargs)
        if place != CPU:
            known = {_address(tensor) for tensor in given}
            for tensor in _tensors(results):
                if _address(tensor) not in known:
                    put(tensor, place)
        return results

    def _whole(self, function: HigherOrderOperator, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operator that takes functions without looking at what these do."""
        places = {place_of(tensor) for tensor in _tensors((args, kwargs)) if tensor.dim()}
        results = function(*args, **kwargs)
        for tensor in _tensors(results):
            put(tensor, next((place for place in places if place != CPU), CPU))
        return results

    def _place(self, name: str, given: Sequence[Tensor], kwargs: dict[str, Any]) -> torch.device:
        marks = [_mark_of(tensor) for tensor in given]
        gpu = next((mark for mark in marks if mark.type == "cuda"), None)
        if gpu is not None:
            for tensor, mark in zip(given, marks, strict=True):
                if mark == _EITHER:
                    put(tensor, gpu)
        places = {place_of(tensor) for tensor in given if tensor.dim() or place_of(tensor) != CPU}
        if len(places) > 1 and name not in _MIXES:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{' and '.join(sorted(map(str, places), reverse=True))}! (when calling {name})"
            )
        if self.recording is not None and gpu and (name in _WAITS or (len(places) > 1 and name in _MIXES)):
            raise RuntimeError(f"CUDA error: {RECORDING} ({name})")
        asked = kwargs.get("device")  # the CPU may be what PyTorch says of a tensor that lies here
        if self.waits_are_said and gpu and name in _WAITS:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=4)
        if asked is not None and torch.device(asked).type == "cpu":
            asked = self.making and self.making[0]
        if asked is not None:
            return placed(asked)
        if not given and self.making is None:
            return _EITHER
        return gpu or CPU

    def _launched(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operator of ours, whose launcher is Python and calls PyTorch again."""
        self.inside += 1
        making, self.making = self.making, None
        try:
            with self:
                return function.redispatch(_ON_CPU, *args, **kwargs)
        finally:
            self.inside -= 1
            self.making = making


MODE = Mode()


def _drawn(function: Any, args: Sequence[Any], kwargs: dict[str, Any], place: torch.device) -> Any:
    """Draw from the generator that was given, or from the default one of the place."""
    given = next((value for value in tree_leaves((args, kwargs)) if isinstance(value, torch._C.Generator)), None)
    if given is not None:
        its = generators.get(given._cdata, CPU)
        if its.type != place.type:
            raise RuntimeError(f"Expected a '{place.type}' device type for generator but found '{its.type}'")
        return function(*args, **kwargs)
    if place.type != "cuda":
        return function(*args, **kwargs)
    kept = torch.default_generator.get_state()
    torch.default_generator.set_state(default_generator.get_state())
    try:
        return function(*args, **kwargs)
    finally:
        default_generator.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(kept)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        return id(tensor)


class Move(torch.autograd.Function):
    """A copy in another place, whose gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, place: torch.device) -> Tensor:
        ctx.place = place_of(tensor)
        return moved(tensor, place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return moved(gradient, ctx.place), None


def moved(tensor: Tensor, place: torch.device) -> Tensor:
    """Return a copy of a tensor in another place."""
    if MODE.recording is not None:
        raise RuntimeError(f"CUDA error: {RECORDING} (a copy between host and GPU)")
    with torch.no_grad(), torch._C._DisableTorchDispatch():
        return put(tensor.clone(), place)


def naming_its_device(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a Python function that makes tensors, so that a device that was named can be told from one that was not."""

    @wraps(function)
    def made(*args: Any, **kwargs: Any) -> Tensor:
        before, MODE.making = MODE.making, (kwargs.get("device"),)
        try:
            return function(*args, **kwargs)
        finally:
            MODE.making = before

    return made
