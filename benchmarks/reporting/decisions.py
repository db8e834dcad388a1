"""The table of what a network's paper says and what is decided, from the rows that its reports show."""

from __future__ import annotations

from trifuse.architectures.runs.decisions import decision_table
from trifuse.architectures.runs.registry import experiment


def decisions_table(name: str) -> str:
    """Return a network's Markdown table, its answers those of the recipe's defaults."""
    network = experiment(name)
    decisions, recipe = network.load(network.decisions), network.load(network.recipe)
    return decision_table(decisions, recipe(), heading="Default", aligned=False)
