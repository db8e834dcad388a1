"""What a run is, as its ``run.json`` says: all of its recipe that must not change when it is resumed."""

from __future__ import annotations

from dataclasses import fields
from types import MappingProxyType
from typing import Any

from trifuse.architectures.storage.config_json import config_to_json

FREE_TO_CHANGE = MappingProxyType({"free_to_change": True})  # metadata of a field that does not change the result


def describe_run(recipe: Any) -> dict[str, Any]:
    """Return what a resumed run must not change of a recipe, as JSON values.

    That is every field but ``training``, which `fit` describes itself, and those with `FREE_TO_CHANGE` as metadata.
    """
    free = {field.name for field in fields(recipe) if field.metadata.get("free_to_change")} | {"training"}
    return {name: value for name, value in config_to_json(recipe).items() if name not in free}
