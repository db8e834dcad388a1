"""The command in a test's own process, and the options that make its trainings take seconds."""

from __future__ import annotations

from collections.abc import Sequence

from trifuse.architectures.cli.main import main

ATRIA_TRAINING = [
    *("--variant", "tiny", "--image-size", "56", "--epochs", "2", "--batch-size", "4", "--lr", "3e-3"),
    *("--set", "network.channels=[8,8,8,4]", "--set", "network.bottleneck_dim=8", "--set", "training.warmup_epochs=0"),
]
ABDOMEN_TRAINING = [
    *("--label-space", "transunet9", "--variant", "nano", "--image-size", "32", "--epochs", "1", "--batch-size", "8"),
    *("--slices", "foreground", "--device", "cpu"),
]
SCAR_TRAINING = [
    *("--image-size", "32", "--epochs", "1", "--batch-size", "4", "--device", "cpu", "--set", "network.base_dim=4"),
    *("--set", "data.patches.samples_per_epoch=8", "--set", "data.patches.mirror=false"),
]


def with_options(words: Sequence[str], **options: object) -> list[str]:
    """Return words with other values of options that they name, e.g. ``epochs=500``."""
    changed = list(words)
    for name, value in options.items():
        changed[changed.index(f"--{name.replace('_', '-')}") + 1] = str(value)
    return changed


def run_main(arguments: Sequence[object], capsys) -> tuple[int, str, str]:
    """Run a command; return its exit code, what it printed, and what it printed of errors."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()
