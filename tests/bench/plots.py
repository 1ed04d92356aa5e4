"""The plots of a replay, as small PNGs: waits by client, loads by policy.  Needs pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from tests.simulation import percentile

PAPER, INK, SOFT, GRID = "#ffffff", "#1f2328", "#59636e", "#e4e7eb"
COLOURS = {"arrival": "#b8bec6", "grouping": "#e0a33e", "llmq": "#2f6fdd"}
WORDS = {
    "arrival": "in order of arrival",
    "grouping": "loaded model first, without bound",
    "llmq": "llmq",
}
SCALE = 2  # drawn twice as large, so that it is sharp on a dense screen
LEFT, WIDTH, BAR, GAP = 92, 720, 11, 14


def font(size: int) -> Any:
    return ImageFont.load_default(size * SCALE)


class Plot:
    """Groups of horizontal bars, one for each policy, with a scale below."""

    def __init__(self, title: str, height: int) -> None:
        self.image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), PAPER)
        self.canvas = ImageDraw.Draw(self.image)
        self.text(16, 12, title, 15)
        self.x = 16
        for policy, words in WORDS.items():
            self.box(self.x, 40, self.x + 10, 50, COLOURS[policy])
            self.text(self.x + 15, 38, words, 11, SOFT)
            self.x += 30 + int(self.canvas.textlength(words, font(11)) / SCALE)

    def text(self, x: float, y: float, words: str, size: int, colour: str = INK) -> None:
        self.canvas.text((x * SCALE, y * SCALE), words, colour, font(size))

    def right(self, x: float, y: float, words: str, size: int, colour: str = INK) -> None:
        length = self.canvas.textlength(words, font(size)) / SCALE
        self.text(x - length, y, words, size, colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        self.canvas.rectangle(
            [left * SCALE, top * SCALE, max(left + 1, right) * SCALE - 1, bottom * SCALE - 1],
            fill=colour,
        )

    def save(self, path: Path) -> None:
        small = self.image.quantize(32)
        small.save(path, optimize=True)


def rounded(most: float) -> float:
    """The end of a scale, of which a quarter is a short number too."""
    step = 1.0
    while True:
        for factor in (1, 1.2, 1.6, 2, 3, 4, 6, 8):
            if step * factor >= most:
                return step * factor
        step *= 10


def bars(plot: Plot, y: int, rows: list[tuple[str, dict[str, tuple[float, float]]]], unit: str) -> int:
    """For each name and policy a bar to the first value, and a thin line on to the second."""
    end = rounded(max(high for _, row in rows for _, high in row.values()))
    room = WIDTH - LEFT - 90
    height = sum(len(row) * BAR + GAP for _, row in rows)
    for part in range(5):
        x = LEFT + room * part / 4
        plot.box(x, y - 4, x + 1, y + height - 6, GRID)
        plot.text(x - 4, y + height - 4, f"{end * part / 4:,.0f}{unit}", 10, SOFT)
    for name, row in rows:
        plot.right(LEFT - 10, y + len(row) * BAR / 2 - 8, name, 12)
        for policy, (low, high) in row.items():
            reach = LEFT + room * high / end
            if high > low:
                plot.box(LEFT, y + 4, reach, y + BAR - 5, COLOURS[policy])
            plot.box(LEFT, y, LEFT + room * low / end, y + BAR - 2, COLOURS[policy])
            strong = INK if policy == "llmq" else SOFT
            plot.text(reach + 6, y - 2, f"{high:,.0f}{unit}", 10, strong)
            y += BAR
        y += GAP
    return y + 26


def draw(found: dict[str, dict[str, Any]], folder: Path) -> None:
    """`found`: by trace and policy the figures of a replay."""
    folder.mkdir(parents=True, exist_ok=True)
    waits(found["homelab"], folder / "fair-waits.png")
    reloads(found, folder / "fair-reloads.png")


def waits(by_policy: dict[str, Any], path: Path) -> None:
    clients = sorted(by_policy["llmq"].waits)
    rows = []
    for client in clients:
        row = {}
        for policy, figure in by_policy.items():
            mine = figure.waits.get(client, [])
            row[policy] = (percentile(mine, 0.5), percentile(mine, 0.99))
        rows.append((client, row))
    height = 110 + sum(len(row) * BAR + GAP for _, row in rows)
    plot = Plot("Wait by client: half wait no longer than the bar, 99 in 100 than the line", height)
    bars(plot, 70, rows, " s")
    plot.save(path)


def reloads(found: dict[str, dict[str, Any]], path: Path) -> None:
    rows = [
        (trace, {policy: (one.loads_a_day,) * 2 for policy, one in by_policy.items()})
        for trace, by_policy in found.items()
    ]
    height = 110 + sum(len(row) * BAR + GAP for _, row in rows)
    plot = Plot("Models loaded in a day", height)
    bars(plot, 70, rows, "")
    plot.save(path)
