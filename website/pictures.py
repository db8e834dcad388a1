"""Take the pictures of the documentation from what the demos wrote: smaller, and with fewer colours.

    make demo
    python website/pictures.py

Which of them the pages show, and in which width, is listed below.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURES = {  # in docs/pictures: the picture of a demo, and its width in pixels
    "left_atrium.png": ("dino_unet/run/figures/test/overlays.png", 440),
    "scar_bullseye.png": ("taff_unet/run/figures/bullseye.png", 1200),
}
COLOURS = 128


def take(demos: Path, out: Path) -> None:
    """Write the pictures of the demos in a folder into another."""
    out.mkdir(exist_ok=True)
    for name, (found, width) in PICTURES.items():
        picture = Image.open(demos / found).convert("RGB")
        small = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
        small.quantize(COLOURS).save(out / name, optimize=True)
        print(out / name)


def main() -> None:
    """Take the pictures that the command line asks for."""
    parser = argparse.ArgumentParser(description="Take the pictures of the documentation from what the demos wrote.")
    parser.add_argument("--demos", type=Path, default=ROOT / "demo", help="folder of the demos (demo)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="where to (docs/pictures)")
    arguments = parser.parse_args()
    take(arguments.demos, arguments.out)


if __name__ == "__main__":
    main()
