"""The picture of the one idea: four nested subnets, each step computing only the new channels.

    python docs/pictures/draw.py    # writes docs/pictures/stepping.svg

Standard library only. The animation is SVG's own (SMIL); a viewer without it shows the last step.
"""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

COLOURS = ("#0b7285", "#2f9e44", "#e8590c", "#9c36b5")  # of levels 1..4
NAMES = ("image", "layer 1", "layer 2", "layer 3", "scores")
UNITS = ((1, 1, 2, 2, 3, 4), (1, 1, 2, 3, 3, 4, 4), (1, 1, 2, 2, 3, 4))  # level of every unit, layer by layer
SECONDS = 2.5  # per step; the last one stays twice as long
WIDTH, HEIGHT, TOP, BOTTOM = 860, 400, 62, 300
COLUMNS = (70, 240, 430, 620, 790)
STEPS = len(COLOURS)
TOTAL = SECONDS * (STEPS + 1)


def _fading(level: int, before: float) -> str:
    """Opacity over time of what step `level` computes: `before` it ran, then 1."""
    start = (level - 1) * SECONDS / TOTAL
    if level == 1:
        return ""
    return (
        f'<animate attributeName="opacity" dur="{TOTAL}s" repeatCount="indefinite" calcMode="discrete" '
        f'values="{before};1" keyTimes="0;{start:.4f}"/>'
    )


def _only(level: int) -> str:
    """Visible only while step `level` is the last one."""
    start, end = (level - 1) * SECONDS / TOTAL, (level * SECONDS / TOTAL if level < STEPS else 1)
    times, values = [start, end], ["1", "0"]
    if level > 1:
        times, values = [0.0, *times], ["0", *values]
    if level == STEPS:
        times, values = times[:-1], values[:-1]
    return (
        f'<animate attributeName="opacity" dur="{TOTAL}s" repeatCount="indefinite" calcMode="discrete" '
        f'values="{";".join(values)}" keyTimes="{";".join(f"{t:.4f}" for t in times)}"/>'
    )


def _places(levels: tuple[int, ...], column: int) -> list[tuple[float, float, int]]:
    gap = (BOTTOM - TOP) / max(len(levels) - 1, 1)
    return [(COLUMNS[column], BOTTOM - k * gap, level) for k, level in enumerate(levels)]


def _line(a: tuple[float, float, int], b: tuple[float, float, int], level: int) -> str:
    return (
        f'<line x1="{a[0]}" y1="{a[1]:.0f}" x2="{b[0]}" y2="{b[1]:.0f}" stroke="{COLOURS[level - 1]}" '
        f'stroke-width="1.2" stroke-opacity="0.55">{_fading(level, 0)}</line>'
    )


def synapses() -> list[str]:
    """A synapse leads from a unit of a lower or equal level; the scores add up what every level contributes."""
    image, scores = (COLUMNS[0], (TOP + BOTTOM) / 2, 1), (COLUMNS[-1], (TOP + BOTTOM) / 2, 1)
    layers = [_places(levels, k) for k, levels in enumerate(UNITS, start=1)]
    parts = [_line(image, unit, unit[2]) for unit in layers[0]]
    for before, after in pairwise(layers):
        parts += [_line(a, b, b[2]) for a, b in product(before, after) if a[2] <= b[2]]
    return parts + [_line(unit, scores, unit[2]) for unit in layers[-1]]


def units() -> list[str]:
    parts = []
    for column, levels in enumerate(UNITS, start=1):
        for x, y, level in _places(levels, column):
            colour = COLOURS[level - 1]
            parts.append(f'<circle cx="{x}" cy="{y:.0f}" r="13" fill="#fff" stroke="#adb5bd" stroke-dasharray="3 3"/>')
            parts.append(f'<circle cx="{x}" cy="{y:.0f}" r="13" fill="{colour}">{_fading(level, 0)}</circle>')
            parts.append(f'<text x="{x}" y="{y + 4.5:.0f}" class="unit" fill="#fff">{level}{_fading(level, 0)}</text>')
    middle = (TOP + BOTTOM) / 2
    for x in (COLUMNS[0], COLUMNS[-1]):
        parts.append(f'<rect x="{x - 24}" y="{middle - 24:.0f}" width="48" height="48" rx="6" fill="#495057"/>')
    return parts


def words() -> list[str]:
    parts = [f'<text x="{x}" y="34" class="name">{name}</text>' for x, name in zip(COLUMNS, NAMES, strict=True)]
    said = (
        "step 1: subnet 1 answers from its own channels",
        "step 2: only the channels of level 2 are computed, from what is there already",
        "step 3: only the channels of level 3",
        "step 4: only the channels of level 4. Nothing was computed twice",
    )
    for level, text in enumerate(said, start=1):
        shown = "1" if level == STEPS else "0"
        parts.append(
            f'<text x="{WIDTH / 2}" y="352" class="said" opacity="{shown}" fill="{COLOURS[level - 1]}">'
            f"{text}{_only(level)}</text>"
        )
    reads = (
        "A channel reads channels of its own or a lower level: a larger subnet never changes what a smaller one has."
    )
    return [*parts, f'<text x="{WIDTH / 2}" y="380" class="name">{reads}</text>']


def picture() -> str:
    style = (
        "text{font-family:system-ui,-apple-system,'Segoe UI',sans-serif;text-anchor:middle}"
        ".name{font-size:13.5px;fill:#495057}.unit{font-size:13px;font-weight:600}.said{font-size:17px;font-weight:600}"
    )
    body = "\n".join([*synapses(), *units(), *words()])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Four nested subnets; every step computes only its own channels.">\n<style>{style}</style>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#fff"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    path = Path(__file__).with_name("stepping.svg")
    path.write_text(picture(), encoding="utf-8")
    print(path)
