#!/usr/bin/env python3
"""Draws a table of curve.py as SVG: draw.py OUT/curve.tsv PICTURE.svg

Above, the losses of both trainers; below, how far apart they are, on a logarithmic scale that ends at curve.py's bar.
"""

import csv
import math
import pathlib
import sys

WIDTH, LEFT, RIGHT = 760, 70, 20
ABOVE, BELOW = (40, 250), (300, 440)  # top and bottom of the two panels
HEIGHT = 490
LOWEST, BAR = 1e-8, 1e-3
HONE, REFERENCE, INK, GRID = "#b3261e", "#9fc5e8", "#333333", "#dddddd"


def text(x, y, what, anchor="middle", extra=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{what}</text>'


def line(x1, y1, x2, y2, colour, extra=""):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {extra}/>'


def path(points, colour, width):
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"/>'


def dots(points, colour, radius):
    return "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>' for x, y in points)


def round_step(span):
    """A step of 1, 2 or 5 times a power of ten that gives about five marks."""
    power = 10 ** math.floor(math.log10(span / 5))
    return next(n * power for n in (1, 2, 5, 10) if span / (n * power) <= 6)


def draw(rows):
    steps, own, theirs = ([float(row[key]) for row in rows] for key in ("step", "loss", "loss_reference"))
    x = lambda step: LEFT + (WIDTH - LEFT - RIGHT) * (step - steps[0]) / max(steps[-1] - steps[0], 1)
    out = []

    # Losses.
    (top, bottom), low, high = ABOVE, 0.0, max(own + theirs)
    y = lambda loss: bottom - (bottom - top) * (loss - low) / (high - low)
    mark = round_step(high - low)
    for n in range(int(high / mark) + 1):
        out += [line(LEFT, y(n * mark), WIDTH - RIGHT, y(n * mark), GRID), text(LEFT - 8, y(n * mark) + 4, f"{n * mark:g}", "end")]
    out += [path([(x(s), y(l)) for s, l in zip(steps, theirs)], REFERENCE, 7)]
    out += [path([(x(s), y(l)) for s, l in zip(steps, own)], HONE, 1.5), dots([(x(s), y(l)) for s, l in zip(steps, own)], HONE, 2.2)]
    out += [text(LEFT, top - 16, "loss of each step, nats a token", "start", 'font-weight="bold"')]
    legend = WIDTH - RIGHT - 250
    out += [line(legend, top + 8, legend + 30, top + 8, REFERENCE, 'stroke-width="7"'), text(legend + 38, top + 12, "PyTorch + transformers + PEFT", "start")]
    out += [line(legend, top + 28, legend + 30, top + 28, HONE, 'stroke-width="1.5"'), text(legend + 38, top + 32, "hone", "start")]

    # Differences.
    (top, bottom), low, high = BELOW, math.log10(LOWEST), math.log10(BAR)
    apart = lambda loss: bottom - (bottom - top) * (math.log10(max(loss, LOWEST)) - low) / (high - low)
    for power in range(round(low), round(high) + 1):
        out += [line(LEFT, apart(10**power), WIDTH - RIGHT, apart(10**power), GRID), text(LEFT - 8, apart(10**power) + 4, f"1e{power}", "end")]
    out += [line(LEFT, top, WIDTH - RIGHT, top, INK, 'stroke-dasharray="6 4"'), text(WIDTH - RIGHT, top + 14, "bar: 1e-3", "end")]
    out += [dots([(x(s), apart(abs(a - b))) for s, a, b in zip(steps, own, theirs)], INK, 2.5)]
    out += [text(LEFT, top - 12, "difference of the two", "start", 'font-weight="bold"')]
    every = max(round(round_step(steps[-1])), 1)
    for step in [s for s in steps if s == steps[0] or s % every == 0]:
        out.append(text(x(step), bottom + 20, f"{step:g}"))
    out.append(text((LEFT + WIDTH - RIGHT) / 2, bottom + 40, "optimizer step"))

    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" fill="{INK}">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *out, "</svg>"]) + "\n"


def main():
    table, picture = map(pathlib.Path, sys.argv[1:])
    with table.open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    picture.write_text(draw(rows))


if __name__ == "__main__":
    main()
