"""What `torch.cuda` and its neighbours say and do where there is a GPU: the functions that ask CUDA itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from .memory import MODE, RECORDING, Gpus, Recording, default_generator, held, placed

PROPERTIES = SimpleNamespace(
    major=9,
    minor=0,
    total_memory=4 << 30,
    multi_processor_count=4,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_multiprocessor=228 << 10,
    shared_memory_per_block_optin=227 << 10,
    L2_cache_size=1 << 20,
)


class Stream:
    """A queue of which there is no other: everything is done at once."""

    device_type, stream_id, cuda_stream = 1, 0, 0

    def __init__(self, device: Any = None, priority: int = 0, **options: Any) -> None:
        self.device = _gpu(device)
        self.device_index = self.device.index

    def wait_stream(self, stream: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        synchronize()

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return MODE.recording is not None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None: ...


class Event:
    """A moment in a queue."""

    def __init__(self, enable_timing: bool = False, **options: Any) -> None:
        self.timed, self.moment = enable_timing, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.moment = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None: ...

    def synchronize(self) -> None:
        synchronize()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Return milliseconds."""
        if not (self.timed and end.timed and self.moment and end.moment):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True' and recorded")
        return max(1e-6, (end.moment - self.moment) * 1e3)


class CUDAGraph:
    """A recording that can be run again."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._recording: Recording | None = None

    def capture_begin(self, *pool: Any, **options: Any) -> None:
        if MODE.recording is not None:
            raise RuntimeError(f"CUDA error: {RECORDING} (another graph)")
        MODE.recording = Recording()

    def capture_end(self) -> None:
        self._recording, MODE.recording = MODE.recording, None
        if self._recording is not None:
            self._recording.undo()

    def replay(self) -> None:
        if self._recording is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        self._recording.replay()

    def reset(self) -> None:
        self._recording = None

    def pool(self) -> tuple[int, int]:
        return (0, 0)


def _gpu(device: Any = None) -> torch.device:
    """Return what a device, a number or nothing means where it must be a GPU."""
    return placed(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")


def synchronize(device: Any = None) -> None:
    if MODE.recording is not None:
        raise RuntimeError(f"CUDA error: {RECORDING} (synchronize)")
    _gpu(device)


def _reset_peak(device: Any = None) -> None:
    held.peak = held.now


def _exchange(device: int) -> int:
    before = Gpus.current
    if device >= 0:
        Gpus.current = _gpu(device).index
    return before if device >= 0 else -1


def _set_device(device: Any) -> None:
    Gpus.current = _gpu(device).index


def _set_rng_state(state: torch.Tensor, device: Any = "cuda") -> None:
    default_generator.set_state(state)


def _set_sync_debug_mode(mode: int | str) -> None:
    MODE.waits_are_said = {"default": 0, "warn": 1}.get(mode, mode)


def _answering(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer


def install(name: str) -> None:
    """Change `torch.cuda`, and what asks for an accelerator of any kind."""
    PROPERTIES.name = name
    answers = {
        "is_available": True,
        "is_initialized": True,
        "get_device_name": name,
        "get_device_capability": (PROPERTIES.major, PROPERTIES.minor),
        "get_device_properties": PROPERTIES,
        "get_arch_list": ["sm_90"],
        "is_bf16_supported": True,
        "empty_cache": None,
        "set_stream": None,
        "init": None,
        "_lazy_init": None,
    }
    functions = {
        "device_count": lambda: Gpus.count,
        "current_device": lambda: Gpus.current,
        "set_device": _set_device,
        "_exchange_device": _exchange,
        "_maybe_exchange_device": _exchange,
        "synchronize": synchronize,
        "get_sync_debug_mode": lambda: MODE.waits_are_said,
        "set_sync_debug_mode": _set_sync_debug_mode,
        "is_current_stream_capturing": lambda: MODE.recording is not None,
        "memory_allocated": lambda device=None: held.now,
        "memory_reserved": lambda device=None: held.now,
        "max_memory_allocated": lambda device=None: held.peak,
        "max_memory_reserved": lambda device=None: held.peak,
        "reset_peak_memory_stats": _reset_peak,
        "mem_get_info": lambda device=None: (PROPERTIES.total_memory - held.now, PROPERTIES.total_memory),
        "manual_seed": default_generator.manual_seed,
        "manual_seed_all": default_generator.manual_seed,
        "initial_seed": default_generator.initial_seed,
        "get_rng_state": lambda device="cuda": default_generator.get_state(),
        "set_rng_state": _set_rng_state,
        "get_rng_state_all": lambda: [default_generator.get_state()],
        "set_rng_state_all": lambda states: _set_rng_state(states[0]),
        "current_stream": Stream,
        "default_stream": Stream,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
    }
    for key, value in ({key: _answering(answer) for key, answer in answers.items()} | functions).items():
        setattr(torch.cuda, key, value)
    torch.cuda._initialized = True
    torch.cuda.graphs.CUDAGraph = CUDAGraph
    torch._C._host_emptyCache = _answering(None)
    torch._C._accelerator_getAccelerator = _answering(torch.device("cuda"))
    torch._C._accelerator_getDeviceIndex = torch.cuda.current_device
    torch._C._accelerator_setDeviceIndex = _set_device
    torch.accelerator.current_stream = Stream
    _autocast_as_on_the_host()
    joined = dist.init_process_group
    dist.init_process_group = lambda backend=None, *args, **kwargs: joined(
        backend and backend.replace("nccl", "gloo"), *args, **kwargs
    )


def _autocast_as_on_the_host() -> None:
    """Let autocast for GPUs govern the CPU's kernels, which compute here."""
    begin = torch.autocast.__init__

    def begin_on_the_host(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        begin(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    torch.autocast.__init__ = begin_on_the_host
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        asked = getattr(torch, name)

        def answer(device_type: str | None = None, asked: Callable[..., Any] = asked) -> Any:
            return asked("cpu" if device_type in (None, "cuda") else device_type)

        setattr(torch, name, answer)
