"""The ``trifuse`` command: one file per command, each with ``add_parser`` and ``run``, and the list of them.

Importing a command's file loads nothing heavy, so that ``--help`` answers at once: what a command needs is imported
when it runs.
"""

COMMANDS = (  # each a file beside this one, in the order in which the help shows them
    "demo",
    "data",
    "train",
    "predict",
    "evaluate",
    "compare",
    "audit",
    "probe",
    "plot",
    "ablate",
    "convert",
    "bench",
    "torture",
    "doctor",
)
