"""Every reader of what a run leaves behind, and of weights, with sound files of the kind that it reads."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from engine import Target
from tiny_networks import BEAT

from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.tables import read_case_table
from trifuse.architectures.plain_unet.model import PlainUNet, PlainUNetConfig
from trifuse.architectures.plain_unet.train import PlainUNetRecipe
from trifuse.architectures.runs.folder import run_section
from trifuse.architectures.runs.recipes import DataRecipe, recipe_from
from trifuse.architectures.runs.registry import experiments
from trifuse.architectures.storage.best_epoch import BestEpoch
from trifuse.architectures.storage.config_json import config_to_json
from trifuse.architectures.storage.epoch_log import EpochLog, read_log, read_start
from trifuse.architectures.storage.pretrained import read_safetensors, write_safetensors
from trifuse.architectures.storage.published_weights import read_tensors
from trifuse.architectures.taff_unet.ecg_autoencoder import EcgAutoencoder
from trifuse.architectures.taff_unet.inputs import read_arteries
from trifuse.architectures.training.loop import _describe
from trifuse.architectures.training.parameter_groups import make_groups
from trifuse.architectures.training.recipe import Recipe
from trifuse.architectures.training.run_folder import open_run, upgraded_description
from trifuse.architectures.training.training_state import TrainerState, load_training_state, save_training_state
from trifuse.kernels.errors import CheckpointError

_CONFIG = PlainUNetConfig(image_size=16, base_dim=4, max_dim=4)


def recipes(folder: Path) -> list[bytes]:
    """Return recipes in TOML."""
    text = '[data]\nroot = "cohort"\nval_cases = ["a", "b"]\n[data.preprocessing]\nimage_size = 32\n'
    text += "[training]\nepochs = 3\nlr = 1e-3\nbetas = [0.9, 0.99]\n[network]\nbase_dim = 4\n"
    return [text.encode()]


def _networks(folder: Path) -> list[bytes]:
    if not (folder / "saved/model.safetensors").is_file():
        PlainUNet(_CONFIG).save_pretrained(folder / "saved")
    return [(folder / "saved/config.json").read_bytes()]


def configurations(folder: Path) -> list[bytes]:
    """Return the descriptions of all networks."""
    made = []
    for known in experiments():
        network = known.load(known.network)
        described = {"format": "trifuse", "schema_version": 1, "architecture": known.name}
        made.append(json.dumps({**described, "config": config_to_json(network.config_type()), "sha256": {}}).encode())
    return made


def _read_configuration(path: Path) -> object:
    refused: Exception | None = None
    for known in experiments():
        try:
            return known.load(known.network).saved_config(path.parent)
        except CheckpointError as error:
            refused = error
    raise refused or AssertionError


def run_description() -> dict[str, Any]:
    """Return what a run.json holds."""
    recipe = recipe_from(PlainUNetRecipe, given={"data.root": "cohort"})
    config = {name: value for name, value in config_to_json(recipe).items() if name != "training"}
    return json.loads(json.dumps(_describe(recipe.training.on(torch.device("cpu")), config, 7)))


def _runs(folder: Path) -> list[bytes]:
    return [json.dumps(run_description()).encode()]


def _resume(path: Path) -> object:
    def upgrade(description: dict[str, Any]) -> dict[str, Any]:
        return upgraded_description(PlainUNetRecipe, {}, description)

    run_section(path.parent, "data", DataRecipe)
    return open_run(path.parent, run_description(), resume=True, force=False, upgrade=upgrade)


class _Position:
    """A network and its optimiser, which are saved once and loaded again and again."""

    def __init__(self) -> None:
        self.model = EcgAutoencoder(BEAT)
        self.groups = make_groups(self.model, Recipe(epochs=3, batch_size=2, lr=1e-3), None)

    def save(self, folder: Path) -> list[bytes]:
        if not (folder / "training_state.json").exists():
            save_training_state(folder, self.model, self.groups, None, TrainerState(epoch=2, best_score=0.5), None)
        return [(folder / "training_state.json").read_bytes()]

    def load(self, path: Path) -> object:
        return load_training_state(path.parent, self.model, self.groups, None, None)


_POSITION = _Position()


def tensor_files(folder: Path) -> list[bytes]:
    """Return safetensors files, one with tied tensors."""
    weight = torch.arange(6.0).reshape(2, 3)
    path = folder / "made.safetensors"
    tensors = {"a": weight, "b": torch.ones(3, dtype=torch.int64), "c": torch.tensor([True])}
    contents = []
    for each in (tensors, {**tensors, "tied": weight, "empty": torch.zeros(0)}):
        write_safetensors(path, each, {"format": "pt"})
        contents.append(path.read_bytes())
    path.unlink()
    return contents


def pickled_weights(folder: Path) -> list[bytes]:
    """Return what torch.save writes of some tensors."""
    packed = io.BytesIO()
    torch.save({"model": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int32)}}, packed)
    return [packed.getvalue()]


def _logs(folder: Path) -> list[bytes]:
    return [b"epoch,step,lr,loss,val_dice\n1,6,0.001,0.5,0.25\n2,12,0.001,0.4,0.5\n"]


def _read_log(path: Path) -> object:
    log = EpochLog(path, 1)
    log.append({"epoch": 2, "step": 3, "lr": 0.1, "loss": 0.2, "val_dice": 0.3})
    return read_log(path)


def score_tables(folder: Path) -> list[bytes]:
    """Return tables of scores, as evaluate writes them."""
    conventions = Conventions("strict")
    columns = ",".join(["case_id", "patient", "class_name", "slice", "status", *conventions.metrics, "conventions"])
    scores = ",".join(["0.5"] * len(conventions.metrics))
    return [f'{columns}\nc1,c1,lv,,ok,{scores},"{conventions.label}"\n'.encode()]


READERS = (
    Target("toml", "text", "recipe.toml", recipes, lambda path: recipe_from(PlainUNetRecipe, path)),
    Target("config", "json", "config.json", configurations, _read_configuration),
    Target("network", "json", "saved/config.json", _networks, lambda path: PlainUNet.from_pretrained(path.parent)),
    Target("run", "json", "run.json", _runs, _resume),
    Target("training_state", "json", "training_state.json", _POSITION.save, _POSITION.load),
    Target("safetensors", "safetensors", "a.safetensors", tensor_files, read_safetensors),
    Target("pickled", "zip", "a.pth", pickled_weights, lambda path: read_tensors(path, "plain_unet")),
    Target("log", "text", "log.csv", _logs, _read_log),
    Target("start", "json", "start.json", lambda f: [b'{"val_dice": 0.5}'], lambda path: read_start(path.parent)),
    Target(
        "score",
        "json",
        "score.json",
        lambda folder: [json.dumps(asdict(BestEpoch(3, "dice", 0.5))).encode()],
        lambda path: BestEpoch.read(path.parent),
    ),
    Target("scores", "text", "test_cases.csv", score_tables, read_case_table),
    Target("arteries", "text", "arteries.csv", lambda folder: [b"case_id,artery\na,LAD\nb,RCA\n"], read_arteries),
)
