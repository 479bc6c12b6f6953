"""Draws docs/rooms.svg from the imports: the rooms of the package, and the way that images take to a checkpoint.

`python scripts/draw_rooms.py` writes it; `--check` ends with 1 where the file is another.
"""

import argparse
import sys
from collections import defaultdict
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import rooms

PICTURE = rooms.ROOT.parent / "docs/rooms.svg"
# Modules that stand alone and serve all others are drawn as one.
ALONE = "single modules"
# Rooms that one run passes through, from images to a folder.
WAY = ("sources", "data", "calibration", "reorder", "choose", "refit", "hub", "recover", "checkpoint")
WIDTH, ROW, BOX, HEIGHT, GAP = 960, 74, 148, 46, 12
STYLE = """
svg { color-scheme: light dark; }
text { font: 13px system-ui, sans-serif; fill: #1f2430; text-anchor: middle; }
.few { font-size: 11px; fill: #5b6475; }
.box { fill: #f4f6fa; stroke: #aab3c5; }
.way .box { fill: #e4f1ea; stroke: #3f8f68; stroke-width: 1.6; }
.number { fill: #3f8f68; } .badge { fill: #fff; font-size: 11px; font-weight: 600; }
path { fill: none; stroke: #aab3c5; stroke-width: 1.2; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e9f0; } .few { fill: #a3adc2; } .box { fill: #262b36; stroke: #596377; }
  .way .box { fill: #1f3a2d; stroke: #5fbf8f; } .number { fill: #2f7a56; } path { stroke: #596377; }
}
"""


def main() -> None:
    """Write the picture, or say whether it is the one that the imports make."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    drawn = picture()
    if parser.parse_args().check:
        sys.exit(not PICTURE.is_file() or PICTURE.read_text(encoding="utf-8") != drawn)
    PICTURE.write_text(drawn, encoding="utf-8")


def picture() -> str:
    """The SVG."""
    modules, arrows = read_rooms()
    levels = rooms.levels(arrows)
    places = {name: place(level, i, len(names)) for level, names in enumerate(levels) for i, name in enumerate(names)}
    drawn = [(upper, lower) for lower, uppers in direct(arrows).items() for upper in sorted(uppers)]
    shapes = [line(places[upper], places[lower]) for upper, lower in drawn]
    shapes += [box(name, places[name], modules[name]) for names in levels for name in names]
    height = ROW * len(levels) + GAP
    title = "Rooms of hf_blockprune: each imports from those above it. Numbers: the way from images to a checkpoint."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n" + "\n".join(shapes) + "\n</svg>\n"
    )


def read_rooms() -> tuple[dict[str, list[str]], dict[str, set[str]]]:
    """(names of the modules of each room, rooms that each imports); what runs is asked that the way is one."""
    modules, arrows = defaultdict(list), defaultdict(set)
    for path in sorted(rooms.ROOT.rglob("*.py")):
        if path == rooms.ROOT / "__init__.py":
            continue
        here = merged(rooms.room_of(path))
        arrows[here] |= {merged(room) for room in rooms.imported_rooms(path)} - {here}
        if path.stem not in ("__init__", "__main__"):
            modules[here].append(path.stem)
    if missing := [room for room in WAY if room not in reached(arrows, "pruner")]:
        raise SystemExit(f"no run passes through {', '.join(missing)}: mend WAY")
    return dict(modules), dict(arrows)


def merged(room: str) -> str:
    """The room, or all that stands alone but for the config, which has a place of its own in the order."""
    return room if (rooms.ROOT / room).is_dir() or room == "config" else ALONE


def direct(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """Arrows without those that others imply."""
    return {
        room: {to for to in tos if not any(to in reached(arrows, other) for other in tos - {to})}
        for room, tos in sorted(arrows.items())
    }


def reached(arrows: dict[str, set[str]], room: str) -> set[str]:
    """All rooms that a room needs, at any distance."""
    found, ahead = set(), list(arrows[room])
    while ahead:
        if (name := ahead.pop()) not in found:
            found.add(name)
            ahead += arrows[name]
    return found


def place(level: int, number: int, count: int) -> tuple[float, float]:
    """Centre of a box."""
    return WIDTH * (number + 0.5) / count, GAP + level * ROW + HEIGHT / 2


def line(upper: tuple[float, float], lower: tuple[float, float]) -> str:
    """From the upper box's lower edge to the lower one's upper edge."""
    (x0, y0), (x1, y1) = upper, lower
    y0, y1 = y0 + HEIGHT / 2, y1 - HEIGHT / 2
    bend = min(ROW - HEIGHT, y1 - y0)
    return f'<path d="M{x0:.0f} {y0:.0f} C{x0:.0f} {y0 + bend:.0f} {x1:.0f} {y1 - bend:.0f} {x1:.0f} {y1:.0f}"/>'


def box(name: str, centre: tuple[float, float], modules: list[str]) -> str:
    """A room, with its modules as a tooltip and its number on the way."""
    x, y = centre
    shown = name if name == ALONE else f"{name}.py" if name == "config" else f"{name}/"
    count = f"{len(modules)} module{'s' * (len(modules) != 1)}"
    badge = css = ""
    if name in WAY:
        left, top = x - BOX / 2, y - HEIGHT / 2
        badge = f'<circle class="number" cx="{left:.0f}" cy="{top:.0f}" r="9"/>'
        css = ' class="way"'
        badge += f'<text class="badge" x="{left:.0f}" y="{top + 4:.0f}">{WAY.index(name) + 1}</text>'
    return (
        f"<g{css}><title>{escape(', '.join(modules))}</title>"
        f'<rect class="box" x="{x - BOX / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{BOX}" height="{HEIGHT}" rx="7"/>'
        f'<text x="{x:.0f}" y="{y - 2:.0f}">{escape(shown)}</text>'
        f'<text class="few" x="{x:.0f}" y="{y + 14:.0f}">{count}</text>{badge}</g>'
    )


if __name__ == "__main__":
    main()
