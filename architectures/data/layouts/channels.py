"""nnU-Net's names of images, ``<case>_<channel>``: the four digits at the end number a channel, not a case.

They mean that wherever images lie: in a data set of nnU-Net, in its ``imagesTs`` alone, or in a folder of images. There
names may also end in four digits that number cases, so only a case of which ``_0000`` is there has channels.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from trifuse.architectures.storage.text import listed
from trifuse.kernels.errors import DataError

from .cohort import Case
from .nnunet_json import DESCRIPTION_FILE, read_description

_IMAGE_NAME = re.compile(r"(.+)_(\d{4})")


def case_and_channel(name: str) -> tuple[str, int] | None:
    """Return case and number of the channel of an image; None if it is not named so."""
    match = _IMAGE_NAME.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def cases_of_images(
    folder: Path, files: Mapping[str, Path], problems: list[DataError], *, channel: str, whole: Container[str] = ()
) -> list[Case]:
    """Make cases without labels of the images in a folder, one of each case that has channels.

    Args:
        folder: of the images.
        files: they, by their names without ending.
        problems: what is wrong is added here: several channels where ``channel`` is empty, or without the one it means.
        channel: its number, or its name in the ``dataset.json`` beside the folder; empty where nobody chose one.
        whole: names that are those of cases, whatever they end in.
    """
    grouped: dict[str, dict[int, str]] = {}
    for name in files:
        if name not in whole and (parts := case_and_channel(name)):
            grouped.setdefault(parts[0], {})[parts[1]] = name
    with_channels = {case: names for case, names in grouped.items() if 0 in names}
    chosen = _number(folder, channel) if channel and with_channels else 0
    cases, of_channels = [], {name for names in with_channels.values() for name in names.values()}
    for name, names in with_channels.items():
        if chosen not in names or (len(names) > 1 and not channel):
            problems.append(
                DataError(
                    folder,
                    f"channels of case {name}",
                    got=listed(names[number] for number in sorted(names)),
                    want=f"{name}_{chosen:04d}, as was trained on" if channel else "one",
                    hint="the networks see one channel: leave the others out; and if these are cases, rename them: "
                    "four digits at the end of a name number channels",
                )
            )
            continue
        others = tuple(files[names[number]] for number in sorted(names) if number != chosen)
        cases.append(Case(name, name, files[names[chosen]], None, other_channels=others))
    return cases + [Case(name, name, path, None) for name, path in files.items() if name not in of_channels]


def channel_number(channel: str, names: Sequence[str], file: Path) -> int:
    """Return the number of a channel by its number or its name, one of ``names``, which ``file`` says.

    Raises:
        DataError: it is neither, or may mean several channels.
    """
    meant = [number for number, name in enumerate(names) if channel in (name, str(number))]
    if len(meant) == 1:
        return meant[0]
    got, want, hint = channel, f"one of {listed(dict.fromkeys((*names, *map(str, range(len(names))))))}", ""
    if meant:
        got = f"{channel}, which may be any of {listed(f'{number} ({names[number]})' for number in meant)}"
        want, hint = (
            "a name or number of one channel",
            f"tell the channels apart in {file.name}, or name it by its number",
        )
    raise DataError(file, "channel", got=got, want=want, hint=hint)


def _number(folder: Path, channel: str) -> int:
    """Return the number of a channel of the images in ``folder``, whose names may be told beside it.

    Raises:
        DataError: it is no number, and no name that is told, or may mean several.
    """
    description = folder.parent / DESCRIPTION_FILE
    if description.is_file() and (names := read_description(folder.parent).channels):
        return channel_number(channel, names, description)
    if channel.isdecimal():
        return int(channel)
    hint = "name it by its number in the training's data set, such as 0"
    raise DataError(folder, "channel", got=channel, want=f"a {DESCRIPTION_FILE} that names it", hint=hint)
