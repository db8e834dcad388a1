"""What the demos of all networks share: one thread, and where to look afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: layers this small gain nothing from a second, and the result is the same everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def print_results(report: Path) -> None:
    """Print where a run's report, pictures and predicted volumes lie."""
    print(f"\nreport:   {report}")
    for picture in sorted(report.parent.glob("figures/**/*.png")):
        print(f"picture:  {picture}")
    print(f"volumes:  {report.parent / 'predictions' / 'test'}")
