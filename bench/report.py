"""Tables of figures: medians with their spread, goals, and the same as text for a terminal and as Markdown. No measuring here."""

import math
import statistics

NOISY = 0.30  # of the median, between the lowest and the highest round


class Figure:
    """The rounds of one cell."""

    def __init__(self, values, digits):
        self.values, self.digits = list(values), digits
        self.median, self.low, self.high = statistics.median(values), min(values), max(values)

    def written(self, value):
        return f"{value:,.{self.digits}f}"

    @property
    def noisy(self):
        apart = self.written(self.low) != self.written(self.high)
        return len(self.values) > 1 and apart and self.high - self.low > NOISY * abs(self.median)

    def brief(self):
        """The spread as a part of the median."""
        if len(self.values) == 1 or self.written(self.low) == self.written(self.high):
            return self.written(self.median)
        spread = f"~{(self.high - self.low) / abs(self.median):.0%}" if self.median else "~"
        return f"{self.written(self.median)} {spread}" + (" noisy" if self.noisy else "")

    def __str__(self):
        if len(self.values) == 1:
            return self.written(self.median)
        return f"{self.written(self.median)} ({self.written(self.low)} .. {self.written(self.high)})" + (" noisy" if self.noisy else "")


class Table:
    """Rows are contenders, columns are (key, heading, digits). Values come round by round, `add`ed in any order.

    `picture` names the columns that are drawn; `limit` the contender that is the line in the picture, if there is one; or the
    line is at a value, `line`; `beside` it stands what it is."""

    def __init__(self, name, title, columns, picture=(), limit="bare", line=None, beside="bare"):
        self.name, self.title, self.columns, self.picture = name, title, columns, picture
        self.limit, self.line, self.beside = limit, line, beside
        self.rows, self.failures, self.notes, self.goals = {}, {}, [], []

    def add(self, row, **values):
        cells = self.rows.setdefault(row, {})
        for key, value in values.items():
            if isinstance(value, str):
                cells[key] = value
            elif value is not None:
                cells.setdefault(key, []).append(value)

    def above(self, key, of, limit="bare"):
        """A column of differences to another row, round by round."""
        self.derive(key, of, limit, lambda value, base: value - base)

    def times(self, key, of, limit="bare"):
        """A column of ratios to another row, round by round."""
        self.derive(key, of, limit, lambda value, base: value / base if base else 0.0)

    def pool(self, key, of, part):
        """A column of quantiles of all that was recorded in all rounds, where one round has too few; `of` are lists."""
        for cells in self.rows.values():
            every = sorted(value for values in cells[of] for value in values)
            cells[key] = [every[math.ceil(part * len(every)) - 1]]

    def derive(self, key, of, limit, how):
        base = self.rows.get(limit, {}).get(of, [])
        for name, cells in self.rows.items():
            if name != limit and base and (values := cells.get(of)):
                cells[key] = [how(value, other) for value, other in zip(values, base)]

    def fail(self, row, why):
        """The row says so and has no figures: they would be of rounds that others were not in."""
        self.rows.pop(row, None)
        self.failures[row] = " ".join(str(why).split())[:240]

    def figure(self, row, key):
        values = self.rows.get(row, {}).get(key)
        digits = next(digits for name, _, digits in self.columns if name == key)
        return Figure(values, digits) if values and not isinstance(values, str) else None

    def goal(self, row, key, at_most, text):
        """One of which there is no figure says so."""
        if figure := self.figure(row, key):
            verdict = "reached" if figure.median <= at_most else "MISSED"
            self.goals.append(f"{verdict}: {text}: {figure.written(figure.median)}, to reach {at_most:,g}"
                              + (" (noisy)" if figure.noisy else ""))
        else:
            self.goals.append(f"not measured: {text}, to reach {at_most:,g}")

    def cells(self, brief=False):
        """Headings, then rows of text, without columns in which there is nothing."""
        heads = ["", *(heading for _, heading, _ in self.columns)]
        lines = []
        for row, values in self.rows.items():
            line = [row]
            for key, _, _ in self.columns:
                figure = self.figure(row, key)
                said = values[key] if isinstance(values.get(key), str) else ""
                line.append(said if figure is None else figure.brief() if brief else str(figure))
            lines.append(line)
        used = [at for at in range(len(heads)) if at == 0 or any(line[at] for line in lines)]
        return [[line[at] for at in used] for line in [heads, *lines]]

    def remarks(self):
        lists = [values for cells in self.rows.values() for values in cells.values() if isinstance(values, list)]
        alone = ["one round: no spread, and nothing that would tell noise"] * all(len(values) == 1 for values in lists)
        return [*(f"{row}: not measured: {why}" for row, why in self.failures.items()), *self.goals, *(alone if lists else []), *self.notes]

    def text(self):
        lines = self.cells(brief=True)
        widths = [max(len(cell) for cell in column) for column in zip(*lines)]
        show = lambda line: "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
        out = ["", self.title, *map(show, lines)]
        return "\n".join([*out, *(f"  {line}" for line in self.remarks())])

    def markdown(self, pictures=()):
        heads, *lines = self.cells()
        show = lambda line: "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
        out = ["", f"## {self.title}", "", show(heads), "|" + "---|" * len(heads), *map(show, lines), ""]
        out += [f"- {line}" for line in self.remarks()]
        return "\n".join([*out, *(line for name in pictures for line in ("", f"![{self.title}]({name})"))])

    def bars(self, key):
        """(name, median, low, high) of each row that has this column, without the limit's; and the limit's median."""
        figures = [(row, figure) for row in self.rows if (figure := self.figure(row, key))]
        limit = next((figure.median for row, figure in figures if row == self.limit), self.line)
        return [(row, one.median, one.low, one.high) for row, one in figures if row != self.limit], limit

    def heading(self, key):
        return next(heading for name, heading, _ in self.columns if name == key)
