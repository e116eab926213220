"""Bars as SVG: one for each contender, from zero, a thin line from the lowest to the highest round, and the limit as a vertical line.

A bar more than three times as long as the next one would leave nothing to see of the others: it is cut, and shows a gap."""

from xml.sax.saxutils import escape

WIDTH, NAMES, ROW, TOP, FOOT = 760, 150, 26, 44, 26
COLOURS = {"ours": "#1f6f8b", "peer": "#a9b4bd", "limit": "#c0392b", "text": "#222222", "spread": "#444444"}


def nice(value):
    """As a person would write it: three digits, no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def bars(title, heading, rows, limit=None, limit_name="bare"):
    """`rows` are (name, median, lowest, highest); a name that begins with `ours` is set off. Nothing to draw is an empty string."""
    most = max([high for *_, high in rows] + ([limit] if limit is not None else []), default=0)
    if not rows or most <= 0:
        return ""
    room = WIDTH - NAMES - 110
    highest, *others = sorted((median for _, median, *_ in rows), reverse=True)
    cut = others and highest > 3 * others[0] and others[0] > 0 and others[0] >= (limit or 0)
    most = 1.5 * others[0] if cut else most
    at = lambda value: NAMES + room * min(max(value, 0), most) / most
    height = TOP + ROW * len(rows) + FOOT
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
           'font-family="sans-serif" font-size="13">',
           f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
           f'<text x="8" y="18" font-weight="bold" fill="{COLOURS["text"]}">{escape(title)}</text>',
           f'<text x="8" y="35" fill="{COLOURS["text"]}">{escape(heading)}</text>']
    for number, (name, median, low, high) in enumerate(rows):
        top = TOP + ROW * number
        middle = top + ROW / 2
        colour = COLOURS["ours" if name.startswith("ours") else "peer"]
        out += [f'<text x="{NAMES - 8}" y="{middle + 4:.1f}" text-anchor="end" fill="{COLOURS["text"]}">{escape(name)}</text>',
                f'<rect x="{NAMES}" y="{top + 4}" width="{at(median) - NAMES:.1f}" height="{ROW - 8}" fill="{colour}"/>',
                f'<line x1="{at(low):.1f}" x2="{at(high):.1f}" y1="{middle:.1f}" y2="{middle:.1f}" stroke="{COLOURS["spread"]}"/>',
                *([f'<rect x="{at(most) - 24}" y="{top}" width="5" height="{ROW}" fill="#ffffff"/>'] if median > most else []),
                f'<text x="{at(max(median, high)) + 6:.1f}" y="{middle + 4:.1f}" fill="{COLOURS["text"]}">{nice(median)}</text>']
    if limit is not None:
        bottom = TOP + ROW * len(rows)
        out += [f'<line x1="{at(limit):.1f}" x2="{at(limit):.1f}" y1="{TOP}" y2="{bottom}" stroke="{COLOURS["limit"]}" stroke-width="2"/>',
                f'<text x="{at(limit) + 4:.1f}" y="{bottom + 16}" fill="{COLOURS["limit"]}">{escape(limit_name)}: {nice(limit)}</text>']
    return "\n".join([*out, "</svg>"]) + "\n"
