"""What a report of FIAS says about its mechanisms: whether CAF's weights differ between images, what a draw moves."""

from __future__ import annotations

from collections.abc import Sequence

from trifuse.architectures.evaluation.audit import Finding, Spread, audit_network
from trifuse.architectures.evaluation.audit_report import percent
from trifuse.architectures.runs.prepared_data import PreparedData
from trifuse.architectures.storage.text import count

from .mechanisms import DRAW, FIXED_WEIGHTS, caf_weights, mechanisms
from .model import Fias

MOST_CASES = 4  # that are predicted again for it: the first of those that the report is about


def describe_mechanisms(model: Fias, data: PreparedData, case_ids: Sequence[str]) -> dict[str, str]:
    """Return the facts on CAF's weights and on Monte Carlo attention's draw, those that the network has.

    Args:
        model: the network with the weights to judge.
        data: the cohort, and how its slices are prepared.
        case_ids: the cases that the report is about.
    """
    asked = [each for each in mechanisms(model) if each.name in (*FIXED_WEIGHTS.values(), DRAW) and each.switch]
    if not asked:
        return {}
    audit = audit_network(model, data.cohort, case_ids[:MOST_CASES], data.recipe.preprocessing, asked)
    found = {finding.mechanism.name: finding for finding in audit.findings}
    facts = {
        f"CAF's {which} weights: SD over images": _spread(which, audit.spreads, found[name])
        for which, name in FIXED_WEIGHTS.items()
        if name in found
    }
    if DRAW in found:
        facts["Monte Carlo attention"] = (
            f"a cell drawn as in training changes {_changed(found[DRAW])}; a prediction draws none, and takes the mean"
        )
    return facts


def _spread(which: str, spreads: Sequence[Spread], fixed: Finding) -> str:
    own = [each for each in spreads if each.name.startswith(caf_weights(which))]
    values = ", ".join(f"{each.sd:.3f}" for each in own)
    saturated = percent(max(each.saturated for each in own))
    return (
        f"{values}, finest level first, over {count(own[0].images, 'image')}; at most {saturated} saturated; weights "
        f"fixed at their mean change {_changed(fixed)}"
    )


def _changed(finding: Finding) -> str:
    """Say what share of the voxels changes."""
    if not finding.moved:
        return f"nothing that can be measured ({finding.unmeasured})"
    return f"{percent(finding.moved[0].share.mean)} of the voxels of {count(finding.cases, 'case')}"
