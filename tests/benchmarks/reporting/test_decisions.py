"""The tables of what papers say and what is decided: one for each network, with the defaults of its recipe."""

from __future__ import annotations

import pytest
from decision_rows import decision_rows

from trifuse.architectures.runs.registry import NETWORKS
from trifuse.benchmarks.reporting.decisions import decisions_table
from trifuse.benchmarks.reporting.tables import with_results


@pytest.mark.parametrize("name", NETWORKS)
def test_a_table_shows_the_defaults(name):
    table = decisions_table(name)
    assert table.startswith("| Question | The paper says | Default | Differs from | Option |\n| --- |")
    rates = {"dino_unet": "5e-05", "fias": "0.0001", "plain_unet": "0.01", "taff_unet": "0.01"}
    assert decision_rows(table)["Learning rate"] == [rates[name], rates[name], "", "`training.lr`"]
    assert "default" not in [row[2] for row in decision_rows(table).values()]


def test_a_page_takes_the_table_of_the_network_that_it_names(tmp_path):
    text = with_results("before\n<!-- decisions: fias -->\nold\n<!-- end -->\nafter", tmp_path)
    assert text == f"before\n<!-- decisions: fias -->\n\n{decisions_table('fias')}\n\n<!-- end -->\nafter"
