"""The picture of all icons that the README shows: `python3 -m tests.tray.sheet` writes it anew."""

from __future__ import annotations

from typing import Any

from tests.fakes import ROOT
from tray.llmq_tray import FACES, draw

PICTURE = ROOT / "tests" / "pictures" / "tray.png"
PIXELS = (64, 32, 22, 16)
PANELS = ("#f3f3f3", "#202124")  # a light and a dark one
ICONS = [
    ("connecting", 0),
    ("idle", 0),
    ("working", 0),
    ("working", 3),
    ("working", 42),
    ("working", 100),
    ("priority", 7),
    ("paused", 0),
    ("paused", 12),
    ("runners", 0),
    ("absent", 0),
    ("denied", 0),
]
STEP, GAP = 72, 8


def sheet() -> Any:
    """Each icon in a column, once per size, on both panels."""
    from PIL import Image

    high = sum(PIXELS) + GAP * (len(PIXELS) + 1)
    picture = Image.new("RGB", (STEP * len(ICONS) + GAP, high * len(PANELS)))
    for row, colour in enumerate(PANELS):
        picture.paste(colour, (0, row * high, picture.width, (row + 1) * high))
        for column, (face, number) in enumerate(ICONS):
            y = row * high + GAP
            for pixels in PIXELS:
                icon = draw(FACES[face], number, pixels)
                x = GAP + column * STEP + (64 - pixels) // 2
                picture.paste(icon, (x, y), icon)
                y += pixels + GAP
    return picture


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    sheet().quantize(128).save(PICTURE, optimize=True)
