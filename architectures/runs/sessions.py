"""By which commands a run came to what it is, where it was trained longer, or otherwise, than it was started."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from trifuse.architectures.evaluation.report import EarlierCommand
from trifuse.architectures.storage.epoch_log import read_log
from trifuse.architectures.training.run_folder import read_sessions

from .folder import LOG_FILE


def earlier_commands(out: Path) -> list[EarlierCommand]:
    """Return the commands that came before the last one and trained by another recipe, in the order of their use.

    A run that was only interrupted and resumed has none: its last command alone does it again, in a new folder too.

    Args:
        out: the run's folder, with ``sessions.jsonl`` and ``log.csv``; sessions of older versions name no command.
    """
    sessions = read_sessions(out)
    trained = [a for a, b in pairwise(sessions) if a["steps_done"] < b["steps_done"]]
    return [
        EarlierCommand(
            session.get("command", ()),
            f"# after {_position(out, following['steps_done'])}: {', '.join(following['changed'])}",
        )
        for session, following in pairwise([*trained, *sessions[-1:]])
        if following.get("changed")
    ]


def _position(out: Path, step: int) -> str:
    """Say where a run stood after a step: at the end of an epoch, or within one."""
    ended = [row["epoch"] for row in read_log(out / LOG_FILE) if row["step"] == step]
    return f"epoch {ended[0]:g}" if ended else f"step {step}"
