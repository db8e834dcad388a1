"""A panel for each lead: where they lie, and what their axes span."""

from __future__ import annotations

import numpy as np
import pytest

from trifuse.architectures.evaluation.twelve_leads import lead_axes


@pytest.mark.parametrize("bar", [False, True])
def test_panels_and_colour_bar_lie_beside_each_other_within_the_figure(bar):
    _, axes, colours = lead_axes("Leads", np.arange(-400.0, 800.0, 2), np.array([-2.0, 3.0]), bar=bar)
    places = [axis.get_position() for axis in (*axes, colours) if axis is not None]
    assert len(places) == 12 + bar
    assert all(0 < place.x0 < place.x1 < 1 and 0 < place.y0 < place.y1 < 1 for place in places)
    assert max(place.x1 for place in places[:12]) < (places[-1].x0 if bar else 1)
    assert axes[0].get_xlim() == (-400, 798)
    low, high = axes[0].get_ylim()
    assert low < -2 < 3 < high < 4
