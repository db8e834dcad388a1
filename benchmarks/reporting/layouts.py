"""The table of the layouts that a cohort's folder may have, from the list that detection and the command read."""

from __future__ import annotations

from trifuse.architectures.data.layouts import LAYOUTS

HEADINGS = ("layout", "what it is", "recognised by", "options", "can be written")


def layouts_table() -> str:
    """Return a Markdown table with one row for each layout, in the order of detection; names link to their sections."""
    rows = [HEADINGS, ("---",) * len(HEADINGS)]
    for layout in LAYOUTS:
        flags = ", ".join(f"`{option.flag}`" for option in layout.options)
        signs = f"`{layout.signs}`".replace(" and ", "` and `").replace(" or ", "` or `")
        exported = "yes" if layout.export else ""
        rows.append((f"[`{layout.name}`](#{layout.name})", layout.summary, signs, flags, exported))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
