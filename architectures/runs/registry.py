"""The networks that there are: the one list of them, and where each is looked up."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .experiment import Experiment

NETWORKS = (  # each a package beside this one that exports an EXPERIMENT
    "dino_unet",
    "fias",
    "plain_unet",
    "taff_unet",
)


def experiments() -> tuple[Experiment, ...]:
    """Return the experiments of all networks."""
    return tuple(map(experiment, NETWORKS))


def experiment(name: str) -> Experiment:
    """Return the experiment of a network.

    Raises:
        KeyError: no network has that name.
    """
    if name not in NETWORKS:
        raise KeyError(name)
    return import_module(f"{__package__.rpartition('.')[0]}.{name}").EXPERIMENT


def experiment_of(recipe: Any) -> Experiment:
    """Return the experiment that a recipe describes a run of.

    Raises:
        TypeError: it is no network's recipe.
    """
    kind = type(recipe)
    for one in experiments():
        if f"{one.package}.{one.recipe}" == f"{kind.__module__}:{kind.__qualname__}":
            return one
    raise TypeError(f"recipe: expected that of one of {', '.join(NETWORKS)}, got a {kind.__qualname__}")
