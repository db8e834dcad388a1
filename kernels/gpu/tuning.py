"""Which form of a kernel runs: the first of its choices, until `warm_up` has timed them and found a faster one.

Nothing is ever timed behind the user's back. A choice can change the order of a summation, and so the last bits of a
result; who does not ask for it gets the same choice, and the same bits, in every run. Who calls `warm_up` has the
choices timed for the shapes that occur in that call. What was found is kept in one file, which later processes read
when they first launch such a kernel; what the file already knows is not timed again, so that it does not change.

Timing repeats a launcher. That is safe, for every launcher writes nothing but its own results.

Choices are kept for a launcher's name, the type of its tensors, the sizes that matter, rounded up to powers of two, the
GPU, the version of triton, and the sources of the kernels. In the interpreter, and in a CUDA graph that is being
captured, nothing is timed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial, update_wrapper
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from trifuse.kernels.errors import BackendError

Choice = Mapping[str, int]
Key = tuple[Any, ...]
Given = ParamSpec("Given")
Result = TypeVar("Result")

LEAST_GAIN = 0.03  # of the first choice's time; what is less is noise
WARM_UP_MS, TIMED_MS = 10, 40  # for each choice

TUNABLES: dict[str, Tunable[Any, Any]] = {}
"""All launchers with several choices that were imported so far, by name."""

_remembered: dict[str, dict[str, int]] | None = None  # what the file says, and what was found since
_found: dict[str, dict[str, int]] = {}  # and not yet in the file
_warming_up = False
_warned: set[str] = set()


class Tunable(Generic[Given, Result]):
    """A launcher that has several forms, and is called without one: made by `tunable`.

    Attributes:
        name: file and function, e.g. ``"weighted_block_fusion.forward"``.
        choices: its forms; the first one is right for most shapes, and runs unless another was found to be faster.
    """

    def __init__(
        self,
        launcher: Callable[Concatenate[Choice, Given], Result],
        choices: Sequence[Choice],
        key: Callable[..., Key],
        is_candidate: Callable[..., bool],
    ) -> None:
        self.name = f"{launcher.__module__.rpartition('.')[2]}.{launcher.__name__}"
        self.choices = tuple(choices)
        self._launcher, self._key, self._is_candidate = launcher, key, is_candidate
        self._chosen: dict[Key, Choice] = {}
        update_wrapper(self, launcher)
        TUNABLES[self.name] = self

    def __call__(self, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        """Launch the form that is known to be the fastest, or else the first."""
        key = self._key(*args, **kwargs)
        choice = self._chosen.get(key)
        if choice is None:
            choice = self._choose(key, args, kwargs)
        return self._launcher(choice, *args, **kwargs)

    def forget(self) -> None:
        """Choose anew from the next launch on."""
        self._chosen.clear()

    def _choose(self, key: Key, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Choice:
        device, *facts = key
        gpu = gpu_name(device)
        if not gpu:
            return self._chosen.setdefault(key, self.choices[0])
        place = " | ".join([self.name, *map(_rounded, facts), gpu, _versions()])
        choice: Choice | None = known().get(place)
        if choice not in self.choices:
            if _warming_up and torch.cuda.is_current_stream_capturing():
                return self.choices[0]
            choice = self._fastest(args, kwargs, device) if _warming_up else None
            if choice is not None:
                known()[place] = _found[place] = dict(choice)
        return self._chosen.setdefault(key, choice or self.choices[0])

    def _fastest(self, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> Choice | None:
        """Time the choices; None where that is impossible."""
        choices = [choice for choice in self.choices if self._is_candidate(choice, *args, **kwargs)]
        times = []
        try:
            for choice in choices:
                try:
                    times.append(milliseconds(partial(self._launcher, choice, *args, **kwargs), device))
                except BackendError:  # too large for this GPU
                    times.append(float("inf"))
        except Exception as error:
            _warn_once("timing", f"kernels cannot be timed here ({type(error).__name__}: {error}); untuned ones run")
            return None
        best = min(range(len(times)), key=times.__getitem__)
        if times[best] == float("inf"):
            return None
        return choices[best if times[best] < (1 - LEAST_GAIN) * times[0] else 0]


def tunable(
    choices: Sequence[Choice], key: Callable[..., Key], is_candidate: Callable[..., bool] = lambda *_, **__: True
) -> Callable[[Callable[Concatenate[Choice, Given], Result]], Tunable[Given, Result]]:
    """Make a launcher, whose first argument is a choice, one that is called without it.

    Args:
        choices: of the launcher, each right for all shapes; the first one is the default.
        key: says what a choice depends on, from the launcher's other arguments: see `key_of`.
        is_candidate: says, from a choice and those arguments, whether it is worth timing; the first one must be.
    """
    return lambda launcher: Tunable(launcher, choices, key, is_candidate)


def key_of(tensor: Tensor, *facts: object) -> Key:
    """Return what a choice depends on: a tensor's device, type and shape, and whatever else matters, hashable."""
    return (tensor.device, tensor.dtype, tensor.shape, *facts)


def _rounded(fact: object) -> str:
    """Write a fact of a key, sizes rounded up to powers of two."""
    if isinstance(fact, tuple):
        return " x ".join(map(_rounded, fact))
    if isinstance(fact, int) and not isinstance(fact, bool) and fact > 1:
        return str(1 << (fact - 1).bit_length())
    return str(fact)


@contextmanager
def forced(launcher: Tunable[Any, Any], choice: Choice) -> Iterator[None]:
    """Have a launcher take one of its choices inside the block, whatever the shapes."""
    before, launcher._chosen = launcher._chosen, _Always(choice)
    try:
        yield
    finally:
        launcher._chosen = before


class _Always(dict[Key, Choice]):
    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.choice = choice

    def get(self, key: object, default: object = None) -> Any:
        return self.choice


def warm_up(function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
    """Call a function, and find the fastest form of every kernel that it launches, for the shapes that occur.

    Pass a whole training step of your network with real shapes; it runs once, and its kernels some hundred times each.
    What is found holds for this process from now on, and for later ones on the same kind of GPU: it is kept in
    ``$TRIFUSE_CACHE/tuning.json``, or else ``~/.cache/trifuse/tuning.json``; delete the file to start over. Without
    this call nothing is timed, and every kernel runs in its first form. On a CPU, or in a CUDA graph that is being
    captured, there is nothing to find: the function is only called. Where kernels cannot be timed or the file cannot
    be read or written, one warning says so.

    Another form may add up in another order. Results repeat bit for bit as long as the forms are the same: from one
    call to the next, and from run to run with the same file.

    Args:
        function: called once, with the arguments that follow.

    Returns:
        What the function returns.

    Examples:
        >>> loss = warm_up(training_step, network, batch)  # doctest: +SKIP
    """
    global _warming_up
    before, _warming_up = _warming_up, True
    for launcher in TUNABLES.values():
        launcher.forget()
    try:
        return function(*args, **kwargs)
    finally:
        _warming_up = before
        if _found:
            _save()


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a launch, with a cold cache."""
    from triton.testing import do_bench

    with torch.cuda.device(device):
        median: float = do_bench(run, warmup=WARM_UP_MS, rep=TIMED_MS, return_mode="median")
        return median


def gpu_name(device: torch.device) -> str:
    """Return the name of a GPU; empty for a CPU, where kernels run in the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@cache
def _versions() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    return f"triton {importlib.metadata.version('triton')} | {digest}"


# ------------------------------------------------------------------------------------------------------ the file


def cache_file() -> Path:
    """Return where choices are kept."""
    folder = os.environ.get("TRIFUSE_CACHE") or os.path.expanduser("~/.cache/trifuse")
    if folder.startswith("~"):  # nobody has a home here: HOME is not set, and the user has no name
        folder = os.path.join(tempfile.gettempdir(), f"trifuse-{os.getuid()}")
    return Path(folder, "tuning.json")


def known() -> dict[str, dict[str, int]]:
    """Return the choices that the file keeps, and those that were found since; it is read at the first call."""
    global _remembered
    if _remembered is None:
        _remembered = _read(cache_file())
    return _remembered


def _read(file: Path) -> dict[str, dict[str, int]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(isinstance(choice, dict) for choice in found.values()):
            raise ValueError("expected an object of objects")
        return found
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _warn_once(str(file), f"{file} cannot be read ({error}); untuned kernels run until warm_up is called again")
        return {}


def _save() -> None:
    """Add what was found to the file; what another process wrote there first stays, and is what holds."""
    global _remembered
    import fcntl  # there is none on Windows, where there is nothing to save either

    file = cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _remembered = known() | _read(file)
            new = file.with_suffix(".new")
            new.write_text(json.dumps(_remembered, indent=1, sort_keys=True), encoding="utf-8")
            new.replace(file)
        _found.clear()
    except OSError as error:
        _warn_once(str(file), f"{file} cannot be written ({error}); what was found holds for this process only")
    for launcher in TUNABLES.values():
        launcher.forget()  # another process may have been first


def _warn_once(subject: str, message: str) -> None:
    if subject not in _warned:
        _warned.add(subject)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
