"""The ledger of what the papers, and the projects they stand on, say, and of what carries it: from fidelity.csv.

A row is one statement, or one silence. Its columns::

    id       <paper>-<section>-<number>
    place    where it stands: an equation, a table, a figure, a part of the paper, or a project's name
    says     what stands there, in our words; empty where nothing does
    by       whose answer is taken: "paper", a project's name, or "trifuse"
    does     what the code does
    code     dotted names, separated by blanks
    test     ids of tests, separated by blanks
    decides  the open questions, see `OPEN`, that it answers
    option   what switches it and its default, separated by "; ": field=value of the recipe of the paper's network,
             network:field=value of another's, or dotted.name(parameter=value)
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).parent / "fidelity.csv"
SHARED = "shared"
PAPER = "paper"
OUTLINE: dict[str, dict[str, tuple[str, int]]] = {
    "dino_unet": {
        "1": ("Data flow", 4),
        "2.1": ("Encoder: architecture", 3),
        "2.2": ("Encoder: positions at another size", 2),
        "2.3": ("Encoder: sizes of images", 2),
        "2.4": ("Encoder: features", 4),
        "2.5": ("Encoder: weights", 1),
        "3.1": ("Fusion: definition", 3),
        "3.2": ("Fusion: gradients", 1),
        "3.3": ("Fusion: operator", 2),
        "3.4": ("Selection of blocks", 3),
        "3.5": ("Where the fused map enters", 3),
        "3.6": ("How theta learns", 2),
        "3.7": ("Fixed blocks", 3),
        "4": ("Image integration", 3),
        "5": ("Decoder", 7),
        "6": ("Training", 10),
        "7": ("Results", 6),
        "8": ("Sizes", 1),
    },
    "fias": {
        "1": ("Data flow", 4),
        "2.1": ("DilateFormer: sizes", 2),
        "2.2": ("DilateFormer: layers", 4),
        "2.3": ("Dilated attention", 5),
        "2.4": ("DilateFormer: maps and weights", 2),
        "3": ("Depthwise multi-kernel encoder (DMK)", 4),
        "4": ("Context-aware fusion (CAF)", 8),
        "5": ("Mixing attention (MixAtt)", 9),
        "5.1": ("Monte Carlo attention", 7),
        "6": ("Heads and inference", 2),
        "7": ("Training", 10),
        "8": ("Results", 7),
        "9": ("Sizes", 1),
    },
    "taff_unet": {
        "1": ("Data flow", 3),
        "2": ("Where the prior comes from", 2),
        "3": ("Backbone", 6),
        "4": ("Temporal-aware feature fusion (TAFF)", 9),
        "4.1": ("TAFF: gradients", 1),
        "4.2": ("TAFF: the ECG as a map", 3),
        "5.1": ("ECG encoder", 3),
        "5.2": ("ECG decoder", 1),
        "5.3": ("ECG autoencoder: quirks of the published code", 4),
        "5.4": ("ECG autoencoder: sizes", 1),
        "6": ("ECG: beats and pretraining", 8),
        "7": ("AHA-17 atlas", 11),
        "8": ("Objective and optimisers", 8),
        "9": ("Results and figures", 9),
        "10": ("Sizes", 1),
    },
    "shared": {
        "0": ("Tensors and operators", 2),
        "1.1": ("Dice", 2),
        "1.2": ("Cross-entropy", 1),
        "1.3": ("Sums of both", 2),
        "1.4": ("Deep supervision", 1),
        "1.5": ("Loss over sums of heads", 2),
        "1.6": ("Reconstruction of an ECG", 1),
        "1.7": ("Entropy of the gate", 1),
        "1.8": ("Quadratic rise", 1),
        "2": ("Scores", 1),
        "2.1": ("Empty masks", 1),
        "2.2": ("HD95", 2),
        "2.3": ("Averages", 1),
        "2.4": ("Significance", 1),
        "3.1": ("LAScarQS", 2),
        "3.2": ("Synapse", 2),
        "3.3": ("ACDC", 2),
        "3.4": ("LGE and ECG", 2),
        "3.5": ("PTB-XL", 1),
        "4.1": ("Preparation: DINO-UNet", 2),
        "4.2": ("Preparation: FIAS", 5),
        "4.3": ("Preparation: TAFF-UNet", 9),
        "5": ("Schedules", 1),
        "6": ("Checkpoints", 1),
        "7": ("Precision", 1),
        "8": ("Report", 1),
        "9": ("Figures", 2),
        "10": ("Random numbers", 1),
    },
}
"""Of each paper, and of what they share, the sections: title, and number of rows."""

PLACES = {
    "dino_unet": ("Eq. 1", "Eq. 2", "Eq. 3", "Sec. II-C", "Fig. 1", "Fig. 2", "Table I", "Table II"),
    "fias": (*(f"Eq. {number}" for number in range(1, 12)), "Fig. 1", "Fig. 3", "ablation", "tables"),
    "taff_unet": ("Fig. 1", "Fig. 2a-c", "Fig. 2d-f", "Fig. 2g", "Fig. 2h", "Fig. 3", "table", "method", "training"),
}
"""What each paper numbers: every one has a row."""

OPEN = {
    "D1": "what the fused map is for, and how theta gets a gradient",
    "D2": "Adam or AdamW",
    "D3": "the loss of DINO-UNet",
    "D4": "channels of the decoder, convolutions per stage",
    "D5": "from which number blocks are counted",
    "D6": "how many patients validate and test",
    "D7": "the learning rate of theta",
    "D8": "over what the scores of Table I are averaged",
    "F1": "what Monte Carlo attention multiplies by",
    "F2": "over what Eq. 5 averages",
    "F3": "which map the depthwise convolutions see",
    "F4": "what the first block of the decoder starts from",
    "F5": "whether each map of the DilateFormer is normalised",
    "F6": "how many epochs",
    "F7": "how one channel becomes three",
    "F8": "what CAF fuses without DMK",
    "F9": "the rate of dropout",
    "E1": "whether the prior comes from the annotation or from a prediction",
    "E2": "the sign of the gate's entropy",
    "E3": "whether the skip gets the fused map",
    "E4": "which level is the middle one",
    "E5": "what the gate sees",
    "E6": "how far, and over how many epochs, the weight of the ECG's loss rises",
    "E7": "how features and leads lie in the autoencoder",
    "E8": "the learning rates of the ECG's part and of the fusion",
    "E9": "where the atlas's angles start without a right ventricle",
    "E10": "unit and sign of the volume difference",
    "S1": "what an entropy that is added does",
    "S2": "whether the losses of the subsets are added or averaged",
    "S3": "what an empty mask scores",
    "S4": "HD95 in voxels or in mm",
    "S5": "which Dice and which cross-entropy",
}
"""Where the papers are silent, or contradict themselves, and something hangs on it: every one has a row."""

_OPTION = re.compile(r"(?:(?P<network>\w+):)?(?P<field>[\w.]+)=(?P<default>[^()]*)|(?P<call>[\w.]+)\((?P<of>.*)\)")


@dataclass(frozen=True)
class Setting:
    """An option of a row: a field of a network's recipe, or a parameter of a function or a class, and its default."""

    owner: str
    name: str
    default: str
    is_field: bool


@dataclass(frozen=True)
class Row:
    """A row of the table, see the module."""

    id: str
    place: str
    says: str
    by: str
    does: str
    code: tuple[str, ...]
    test: tuple[str, ...]
    decides: tuple[str, ...]
    option: str

    @property
    def paper(self) -> str:
        """The network whose paper it is of, or `SHARED`."""
        return self.id.split("-")[0]

    @property
    def section(self) -> str:
        """The section of the outline."""
        return self.id.split("-")[1]

    @property
    def settings(self) -> Iterator[Setting]:
        """Its options.

        Raises:
            ValueError: what is none.
        """
        for option in self.option.split("; ") if self.option else ():
            match = _OPTION.fullmatch(option)
            if match is None:
                raise ValueError(f"{self.id}: expected field=value or dotted.name(parameter=value), got {option!r}")
            if match["call"] is None:
                yield Setting(match["network"] or self.paper, match["field"], match["default"], is_field=True)
            else:
                name, _, default = match["of"].partition("=")
                yield Setting(match["call"], name, default, is_field=False)


def rows() -> list[Row]:
    """Return the rows of the table."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return [
            Row(
                **{name: line[name] for name in ("id", "place", "says", "by", "does", "option")},
                **{name: tuple(line[name].split()) for name in ("code", "test", "decides")},
            )
            for line in csv.DictReader(file)
        ]


def fidelity_tables(paper: str) -> str:
    """Return the tables of a paper, one for each section, or of the open questions for ``"open"``."""
    if paper == "open":
        return _open_questions()
    parts = []
    for section, (title, _) in OUTLINE[paper].items():
        cells = [_cells(row) for row in rows() if (row.paper, row.section) == (paper, section)]
        header = ["Row", "Where", "What it says", "What trifuse does", "Code", "Tests", "Option"]
        parts += [f"### {section} {title}", _markdown(header, cells)]
    return "\n\n".join(parts)


def _cells(row: Row) -> list[str]:
    number = row.id.partition("-")[2]
    return [
        f"{number} ({', '.join(row.decides)})" if row.decides else number,
        row.place,
        row.says or "not said",
        row.does if row.by == PAPER else f"{row.does} ({row.by})",
        ", ".join(map(_code, row.code)),
        ", ".join(map(_test, row.test)),
        ", ".join(map(_setting, row.settings)),
    ]


def _code(name: str) -> str:
    """Link a dotted name to its file."""
    parts = name.split(".")[1:]
    root = TABLE.parents[2]
    length = next(n for n in range(len(parts), 0, -1) if (root.joinpath(*parts[:n])).with_suffix(".py").is_file())
    return f"[`{'.'.join(parts[length:])}`](../{'/'.join(parts[:length])}.py)"


def _test(name: str) -> str:
    """Link a test to its file."""
    file, _, function = name.partition("::")
    return f"[{function.removeprefix('test_').replace('_', ' ')}](../{file})"


def _setting(setting: Setting) -> str:
    value = f"{setting.name}={setting.default or 'none'}"
    return f"`{value}`" if setting.is_field else f"`{setting.owner.rpartition('.')[2]}({value})`"


def _open_questions() -> str:
    answers: dict[str, list[str]] = {}
    for row in rows():
        for question in row.decides:
            answers.setdefault(question, []).append(f"{row.id.replace('-', ' ', 1)}: {row.does}")
    cells = [[id_, question, "<br>".join(answers[id_])] for id_, question in OPEN.items()]
    return _markdown(["", "Question", "Rows that answer it"], cells)


def _markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown themselves."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *cells))
