"""Heat maps of the probabilities of the choices over the steps, one map per block."""

import itertools

import numpy as np
from matplotlib.figure import Figure

from fpnas_keras.report.themes import Theme
from fpnas_keras.runs.search_run import SearchRun

# All sizes are in inches.
_ROW_HEIGHT = 0.165  # of one choice
_VARIABLE_GAP = 0.07  # between the variables of a block
_MAP_WIDTH = 1.4
_LETTER_WIDTH = 0.055
_HEADER_HEIGHT = 0.32  # title and phases of a block
_BLOCK_MARGINS = 0.75  # header, steps below the map and the space to the next block
_COLOR_BAR_HEIGHT = 0.5
_MAX_WIDTH = 12  # of all maps side by side
_MIN_WIDTH = 3.2  # for the color bar
# Compound choices are wider than their map, so they are abbreviated as in latency tables.
_ABBREVIATIONS = {
    "skip=True": "skip",
    "kernel_size=": "k",
    "expansion=": "e",
    "activation=": "",
    ", ": " ",
}
_MAX_LETTERS = 24


def draw_heat_maps(run: SearchRun, theme: Theme) -> Figure:
    """Draws the probability of each choice after each epoch.

    Each block that has something to choose has a heat map: a row is a choice, a column is an
    epoch. The variables of a block stand one below another, with a gap between them. All maps have
    the same color scale.

    Args:
        run: The search. At least one block must have probabilities.
        theme: Colors.
    """
    return _HeatMaps(run, theme).draw()


class _HeatMaps:
    """A figure with one set of axes. Its coordinates are inches from the top left corner."""

    def __init__(self, run, theme):
        self.theme = theme
        self.phases = run.phases
        self.rows = run.probabilities
        self.steps = np.array([0] + [row["step"] for row in self.rows])
        self.blocks = {
            index: variables for index, variables in enumerate(self.rows[0]["blocks"]) if variables
        }
        labels = [
            (_abbreviate(variable), _abbreviate(choice))
            for variables in self.blocks.values()
            for variable, choices in variables.items()
            for choice in choices
        ]
        # Widths of the names of the variables and of the choices, left of a map.
        widths = [0.1 + _LETTER_WIDTH * max(map(len, column)) for column in zip(*labels)]
        self.labels_width = sum(widths)

    def draw(self):
        """Draws all maps, with as many maps side by side as fit."""
        block_width = self.labels_width + _MAP_WIDTH + 0.22
        columns = max(1, min(len(self.blocks), int(_MAX_WIDTH // block_width)))
        indices = list(self.blocks)
        lines = [indices[start : start + columns] for start in range(0, len(indices), columns)]
        heights = [max(map(self._map_height, line)) + _BLOCK_MARGINS for line in lines]
        tops = itertools.accumulate(heights, initial=_COLOR_BAR_HEIGHT)
        self._make_axes(max(columns * block_width, _MIN_WIDTH), _COLOR_BAR_HEIGHT + sum(heights))
        self._draw_color_bar(self.labels_width)
        for line, top in zip(lines, tops):
            for column, index in enumerate(line):
                left = column * block_width + self.labels_width
                self._draw_frame(index, left, top)
                self._draw_map(index, left, top + _HEADER_HEIGHT)
        return self.axes.figure

    def _make_axes(self, width, height):
        figure = Figure((width, height), facecolor=self.theme.ground)
        self.axes = figure.add_axes(
            (0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False
        )
        self.axes.set_axis_off()

    def _map_height(self, index):
        variables = self.blocks[index].values()
        return _ROW_HEIGHT * sum(map(len, variables)) + _VARIABLE_GAP * (len(variables) - 1)

    def _draw_color_bar(self, left):
        self._text(left - 0.07, 0.16, "probability", ha="right")
        edges = left + np.linspace(0, _MAP_WIDTH, 257)
        self._shade(edges, (0.1, 0.22), np.linspace([0], [1], 256).T)
        for value, side in ((0, "left"), (0.5, "center"), (1, "right")):
            self._tick(left + value * _MAP_WIDTH, 0.26, f"{value:g}", side)

    def _draw_frame(self, index, left, top):
        """Draws the title, the phases and the range of the steps around a map."""
        self._text(left, top + 0.12, f"block {index}", fontweight="bold", fontsize=9)
        top += _HEADER_HEIGHT
        bottom, last = top + self._map_height(index), self.steps[-1]
        for name, start, end in self.phases:
            x = left + _MAP_WIDTH * np.minimum([start, end], last) / last
            color = self.theme.phases[name]
            self.axes.fill_between(x, top - 0.09, top - 0.03, color=color, linewidth=0)
            if 0 < start < last:
                self.axes.vlines(x[0], top, bottom, self.theme.muted, "dotted", linewidth=0.8)
        self._tick(left, bottom + 0.05, "0", "left")
        self._tick(left + _MAP_WIDTH, bottom + 0.05, f"step {last:,}", "right")

    def _draw_map(self, index, left, top):
        """Draws the probabilities of a block, with the names of its choices on the left."""
        x = left + _MAP_WIDTH * self.steps / self.steps[-1]
        for variable, choices in self.blocks[index].items():
            edges = top + _ROW_HEIGHT * np.arange(len(choices) + 1)
            for choice, edge in zip(choices, edges):
                self._text(left - 0.07, edge + _ROW_HEIGHT / 2, _abbreviate(choice), ha="right")
            name = _abbreviate(variable)
            color = self.theme.muted
            self._text(left - self.labels_width, top + _ROW_HEIGHT / 2, name, color=color)
            probabilities = [
                [row["blocks"][index][variable][choice] for row in self.rows] for choice in choices
            ]
            self._shade(x, edges, probabilities)
            top = edges[-1] + _VARIABLE_GAP

    def _shade(self, x, y, probabilities):
        # Rasterized, because thousands of rectangles make an SVG slow; first, so that it is below
        # everything else.
        mesh = self.axes.pcolormesh(x, y, probabilities, vmin=0, vmax=1, rasterized=True, zorder=0)
        mesh.set(cmap=self.theme.color_map)

    def _tick(self, x, y, text, side):
        self._text(x, y, text, ha=side, va="top", fontsize=7.5, color=self.theme.muted)

    def _text(self, x, y, text, **style):
        style = {"va": "center", "fontsize": 8, "color": self.theme.ink} | style
        self.axes.text(x, y, text, parse_math=False, **style)


def _abbreviate(name):
    """Shortens a name to the room beside a map, and to characters that can be drawn."""
    name = name.encode(errors="replace").decode()  # JSON may hold lone surrogates
    for long, short in _ABBREVIATIONS.items():
        name = name.replace(long, short)
    return name if len(name) <= _MAX_LETTERS else name[: _MAX_LETTERS - 1] + "\u2026"
