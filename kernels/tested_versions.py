"""Which versions of torch, Triton and other packages trifuse was tested with, and what came of it.

``make versions`` runs the tests with each supported pair and writes the verdicts, which are part of the package;
``trifuse doctor`` says them. A verdict on the other packages is a row of its own, with ``others`` ``"floors"`` or
``"newest"``.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

VERDICTS = Path(__file__).parent / "testing" / "verdicts"
VERSIONS = VERDICTS / "versions.csv"
VIRTUAL_GPU = VERDICTS / "virtual_gpu.csv"
HOLD_FOR = "verdicts hold for the commit named, not for what has changed since"
# Before 3.7, Triton's interpreter makes Python numbers of arrays with one element, which NumPy 2.4 refuses.
FIRST_TRITON_FOR_ANY_NUMPY, FIRST_NUMPY_TOO_NEW = (3, 7), (2, 4)
COMMIT_DIGITS = 7

Verdict = Mapping[str, str]


def read_verdicts(file: Path) -> list[Verdict]:
    """Return the rows of a file of verdicts, in its order; none where no file is there."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def describe_pair(torch: str, triton: str, verdicts: Sequence[Verdict]) -> str:
    """Say whether a torch and a Triton are among the tested pairs, and what came of it."""
    torch = torch.partition("+")[0]  # a build for another CUDA is the same version
    pairs = [row for row in verdicts if not row["others"]]
    for row in pairs:
        if (row["torch"], row["triton"]) == (torch, triton):
            return f"torch {torch} with triton {triton}: {_outcome(row)}"
    tested = ", ".join(f"{row['torch']} with {row['triton']}" for row in pairs) or "none"
    return f"torch {torch} with triton {triton} is not among the tested pairs: {tested}"


def describe_others(verdicts: Sequence[Verdict]) -> str:
    """Say what came of the tests with all other packages at their floors, and at their newest; empty if not tested."""
    words = {"floors": "at the oldest versions that may be installed", "newest": "at the newest"}
    found = [f"{words[row['others']]}, torch {row['torch']}: {_outcome(row)}" for row in verdicts if row["others"]]
    return "; ".join(found)


def _outcome(row: Verdict) -> str:
    failed = "none failed" if row["failed"] == "0" else f"{row['failed']} failed"
    counts = f"{row['passed']} tests passed, {failed}, {_skipped(row)}"
    return f"{counts} (commit {_short(row['commit'])}, {row['date']})"


def numpy_remedy(triton: str, numpy: str) -> str:
    """Say what to do where Triton's interpreter does not work with the NumPy beside it; empty where it does."""
    old_triton = () < _release(triton) < FIRST_TRITON_FOR_ANY_NUMPY
    if not old_triton or _release(numpy) < FIRST_NUMPY_TOO_NEW:
        return ""
    return f"the interpreter of triton {triton} does not work with numpy {numpy}; run: pip install 'numpy<2.4'"


def _release(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def describe_virtual_gpu(verdicts: Sequence[Verdict]) -> str:
    """Say what compiled kernels did on the virtual GPU."""
    sound, launches = sum(row["verdict"] == "sound" for row in verdicts), sum(int(row["launches"]) for row in verdicts)
    operators = len({row["operator"] for row in verdicts})
    commits: dict[str, dict[str, None]] = {}
    for row in verdicts:
        commits.setdefault(f"torch {row['torch']}, triton {row['triton']}", {})[_short(row["commit"])] = None
    made_of = (f"{pair}, commit {', '.join(some)}" for pair, some in commits.items())
    return (
        f"{sound} of {len(verdicts)} calls of {operators} operators showed no fault on the virtual GPU, in {launches} "
        f"launches of compiled kernels; no GPU was used ({'; '.join(made_of)})"
    )


def _skipped(row: Verdict) -> str:
    """Say how many tests were skipped, and why where the verdict tells."""
    if row["skipped"] == "0" or not row.get("why_skipped"):
        return f"{row['skipped']} were skipped"
    return f"skipped: {row['why_skipped'].replace('needs a GPU', 'need a GPU')}"


def _short(commit: str) -> str:
    return commit[:COMMIT_DIGITS]
