"""Pictures of bench.py's tables, as SVG."""

import math

HONE, PEER, BAR, INK, GRID = "#b3261e", "#7aa6d6", "#1b7f4d", "#333333", "#dddddd"


def text(x, y, what, anchor="start", extra=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{what}</text>'


def line(x1, y1, x2, y2, colour, extra=""):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {extra}/>'


def page(width, height, out):
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="{INK}">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *out, "</svg>"]) + "\n"


def marks(high):
    """Values of 1, 2 or 5 times a power of ten apart, from 0 past `high`, about five of them."""
    power = 10 ** math.floor(math.log10(high / 5))
    step = next(n * power for n in (1, 2, 5, 10) if high / (n * power) <= 6)
    return [n * step for n in range(math.ceil(high / step) + 1)]


# --------------------------------------------------------------------------------------------------------------------- the comparison

LABELS, SPEED, MEMORY = 300, (310, 690), (730, 970)  # columns: the end of the names, and the two scales
TOP, ROW, GAP = 96, 22, 30  # the first group's title, a line of a group, a group's title


def scale(span, entries, value, bar, top, bottom):
    """A column's grid, and where a value of it lies. All ratios are of hone over the peer, more is better."""
    left, right = span
    values = marks(max([value(e) for e in entries] + [e[bar] or 0.0 for e in entries] + [1.0]) * 1.02)
    x = lambda v: left + (right - left) * v / values[-1]
    out = [line(x(v), top, x(v), bottom, GRID) + text(x(v), bottom + 16, f"{v:g}", "middle") for v in values]
    return out + [line(x(1), top, x(1), bottom, INK, 'stroke-dasharray="3 3"')], x


def bars(entries, about):
    """Ratios of speed and of memory, one line a peer, grouped by work, each beside what is to be reached."""
    groups = {}
    for entry in entries:
        groups.setdefault(entry["what"], []).append(entry)
    bottom = TOP + len(groups) * GAP + len(entries) * ROW
    out = [text(16, 26, "hone beside its peers on one machine, in turn", extra='font-size="16" font-weight="bold"')]
    out += [text(16, 46, f"{about['processor']}, {about['threads']} threads, {about['date']}; median of {about['pairs']} pairs and their range")]
    grid, speed = scale(SPEED, entries, lambda e: e["speed_range"][1], "speed_bar", TOP - 10, bottom)
    out += grid + [text(SPEED[0], TOP - 20, "times the peer's tokens a second", extra='font-weight="bold"')]
    grid, memory = scale(MEMORY, entries, lambda e: e["memory"], "memory_bar", TOP - 10, bottom)
    out += grid + [text(MEMORY[0], TOP - 20, "the peer's peak memory over hone's", extra='font-weight="bold"')]
    y = TOP
    for what, group in groups.items():
        out.append(text(16, y + 18, what, extra='font-weight="bold"'))
        y += GAP
        for e in group:
            out.append(text(LABELS, y + 12, e["peer"], "end"))
            for x, value, bar in ((speed, e["speed"], e["speed_bar"]), (memory, e["memory"], e["memory_bar"])):
                out.append(f'<rect x="{x(0):.1f}" y="{y + 2}" width="{x(value) - x(0):.1f}" height="{ROW - 8}" fill="{HONE}" fill-opacity="0.75"/>')
                out.append(text(x(0) + 5, y + 13, f"{value:.2f}", extra='fill="white" font-size="11"') if x(value) - x(0) > 40 else "")
                out += [line(x(bar), y - 2, x(bar), y + ROW - 3, BAR, 'stroke-width="3"')] if bar else []
            low, high = map(speed, e["speed_range"])
            out.append(line(low, y + ROW / 2 - 2, high, y + ROW / 2 - 2, INK, 'stroke-width="1.5"'))
            y += ROW
    out += [line(SPEED[0] + 2, bottom + 28, SPEED[0] + 2, bottom + 44, BAR, 'stroke-width="3"'), text(SPEED[0] + 10, bottom + 40, "to be reached")]
    out += [line(SPEED[0] + 120, bottom + 36, SPEED[0] + 150, bottom + 36, INK, 'stroke-width="1.5"'), text(SPEED[0] + 158, bottom + 40, "range of the pairs")]
    return page(1000, bottom + 60, out)


# ------------------------------------------------------------------------------------------------------------------------- scaling

COLUMN, PLOT, HIGH = 330, 250, 190  # a panel's place, and its size


def panel(left, top, points, key, title):
    """One value by one quantity, both sides."""
    values = sorted({p["value"] for p in points})
    ticks = marks(max(p[key] for p in points) * 1.02)
    x = lambda v: left + PLOT * (v / values[-1])
    y = lambda v: top + HIGH * (1 - v / ticks[-1])
    out = [line(left, y(v), left + PLOT, y(v), GRID) + text(left - 6, y(v) + 4, f"{v:,g}", "end") for v in ticks]
    shown = [v for at, v in enumerate(values) if at == 0 or v - values[at - 1] >= values[-1] / 9]
    out += [text(x(v), top + HIGH + 16, f"{v:,}", "middle", 'font-size="11"') for v in shown]
    out.append(text(left, top - 10, title, extra='font-weight="bold"'))
    for side, colour in (("PyTorch", PEER), ("hone", HONE)):
        places = [(x(p["value"]), y(p[key])) for p in points if p["side"] == side]
        way = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        out.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>' for a, b in places]
    return out


def lines(points, about):
    """Time and memory by tokens, layers and threads."""
    out = [text(16, 26, "A LoRA step in bf16 by tokens, layers and threads", extra='font-size="16" font-weight="bold"')]
    out += [text(16, 46, f"{about['processor']}, {about['date']}; 1,024 tokens, 30 layers and 2 threads where nothing else is said")]
    for at, what in enumerate(("tokens", "layers", "threads")):
        if chosen := [p for p in points if p["what"] == what]:
            left = 70 + at * COLUMN
            out += panel(left, 90, chosen, "step_s", f"seconds by {what}") + panel(left, 340, chosen, "peak_mb", f"peak MB by {what}")
    for at, (side, colour) in enumerate((("hone", HONE), ("PyTorch", PEER))):
        out += [line(70 + at * 100, 582, 95 + at * 100, 582, colour, 'stroke-width="3"'), text(102 + at * 100, 586, side)]
    return page(70 + 3 * COLUMN, 605, out)
