"""Plots of an inspection, as SVG. Needs matplotlib (extra ``plot``)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pairformer_fast.inference.bias_inspection import AttentionInspection
from pairformer_fast.inference.inspection_run import PLOTS, JobInspection

STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "inspect", "font.size": 8}
MARKERS = "osD^"
LABELLED_TILES = 8
"""Edge up to which tiles are labelled."""
SMALLEST = 1e-4
"""Singular values below this share of the largest are not shown; the last one always is zero."""


def draw(job: JobInspection) -> dict[str, str]:
    """SVG texts by the names of their files, :data:`~pairformer_fast.inference.inspection_run.PLOTS`."""
    with matplotlib.rc_context(STYLE):
        figures = (_spectra(job), _ranks(job), _dense_tiles(job), _bound(job))
        return {name: _svg(figure) for name, figure in zip(PLOTS, figures, strict=True)}


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return text.getvalue()


def _kinds(job: JobInspection) -> dict[str, list[tuple[str, AttentionInspection]]]:
    """Attentions that differ in the number of their block only, by what their labels have in common."""
    kinds: dict[str, list[tuple[str, AttentionInspection]]] = {}
    for label, attention in zip(job.labels, job.attentions, strict=True):
        parts = label.split(".")
        kind = ".".join(part for part in parts if not part.isdigit())
        number = ".".join(part for part in parts if part.isdigit())
        kinds.setdefault(kind, []).append((number, attention))
    return kinds


def _columns(kinds: dict, rows: int, width: float, height: float) -> tuple[Figure, Iterator[np.ndarray]]:
    """A figure with a column of ``rows`` axes for every kind of attention."""
    figure = Figure(figsize=(width * len(kinds), height), layout="constrained")
    return figure, iter(figure.subplots(rows, len(kinds), squeeze=False).T)


def _spectra(job: JobInspection) -> Figure:
    kinds = _kinds(job)
    figure, columns = _columns(kinds, rows=2, width=3.2, height=5)
    figure.suptitle(f"{job.id}: spectra of the pair bias, median of the heads and their range")
    for (kind, members), (values_axes, energy_axes) in zip(kinds.items(), columns, strict=True):
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(members)))
        for (number, attention), colour in zip(members, colours, strict=True):
            values = np.array([spectrum.values for spectrum in attention.spectrum])
            energy = np.array([spectrum.energy for spectrum in attention.spectrum])
            largest = np.maximum(values[:, :1], np.finfo(float).tiny)
            _band(values_axes, np.maximum(values / largest, SMALLEST / 10), colour, number)
            _band(energy_axes, energy, colour, number)
        values_axes.set(title=kind, xscale="log", yscale="log", ylim=(SMALLEST, 1.5), ylabel="singular value / largest")
        energy_axes.set(xscale="log", xlabel="rank", ylabel="energy kept", ylim=(0, 1.02))
        energy_axes.legend(title="block", loc="lower right", ncols=1 + len(members) // 8)
    return figure


def _band(axes: Axes, curves: np.ndarray, colour: np.ndarray, label: str) -> None:
    """Median and range of curves ``[H, K]``."""
    rank = np.arange(1, curves.shape[1] + 1)
    axes.plot(rank, np.median(curves, axis=0), color=colour, label=label)
    axes.fill_between(rank, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.12, linewidth=0)


def _ranks(job: JobInspection) -> Figure:
    kinds = _kinds(job)
    heads = [max(attention.heads for _, attention in members) for members in kinds.values()]
    most = max(len(members) for members in kinds.values())
    figure = Figure(figsize=(1.2 * len(kinds) + 0.35 * sum(heads), 1.4 + 0.28 * most), layout="constrained")
    figure.suptitle(f"{job.id}: rank by head; where the bias stayed dense, the rank of factors in its place")
    norm = LogNorm(1, max(attention.tokens for attention in job.attentions) + 1)
    panels = figure.subplots(1, len(kinds), squeeze=False, width_ratios=heads)[0]
    for (kind, members), axes in zip(kinds.items(), panels, strict=True):
        ranks = np.full((len(members), max(attention.heads for _, attention in members)), np.nan)
        for row, (_, attention) in enumerate(members):
            ranks[row, : attention.heads] = np.maximum(attention.factors.rank, 1)
            for head, rank in enumerate(attention.factors.rank):
                colour = "white" if norm(max(rank, 1)) < 0.6 else "black"
                axes.text(head, row, str(rank), ha="center", va="center", color=colour, fontsize=7)
        axes.imshow(ranks, norm=norm, cmap="viridis", aspect="auto")
        axes.set(title=kind, xlabel="head", ylabel="block")
        axes.set_xticks(range(ranks.shape[1]))
        rows = [f"{number} dense" if attention.choice == "dense" else number for number, attention in members]
        axes.set_yticks(range(len(members)), rows)
    return figure


def _dense_tiles(job: JobInspection) -> Figure:
    kinds = _kinds(job)
    most = max(len(members) for members in kinds.values())
    figure, columns = _columns(kinds, rows=most, width=2.2, height=1 + 1.9 * most)
    figure.suptitle(f"{job.id}: tiles of {job.tile} x {job.tile};\nheads in which the bound is above {job.tolerance:g}")
    for (kind, members), column in zip(kinds.items(), columns, strict=True):
        for axes in column[len(members) :]:
            axes.axis("off")
        for (number, attention), axes in zip(members, column, strict=False):
            bound = np.tanh(np.array([tile_map.deviation for tile_map in attention.tiles]).max(axis=0) / 2)
            above = np.sum([tile_map.dense for tile_map in attention.tiles], axis=0)
            image = axes.imshow(bound, vmin=0, vmax=1, cmap="viridis")
            if len(bound) <= LABELLED_TILES:
                for (query, key), count in np.ndenumerate(above):
                    colour = "white" if bound[query, key] < 0.6 else "black"
                    axes.text(key, query, str(count), ha="center", va="center", color=colour, fontsize=6)
            axes.set_title(" ".join(filter(None, (kind, number, f"of {attention.heads} heads"))), fontsize=7)
            axes.set(xlabel="tile of keys", ylabel="tile of queries")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.colorbar(image, ax=figure.axes, label="tanh(deviation / 2), largest of the heads", shrink=0.5)
    return figure


def _bound(job: JobInspection) -> Figure:
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    rungs = [rung for attention in job.attentions for rung in attention.ladder]
    norm = LogNorm(min(rung.at for rung in rungs), max(rung.at for rung in rungs) + 1)
    for method, marker in zip(dict.fromkeys(rung.method for rung in rungs), MARKERS, strict=False):
        mine = [rung for rung in rungs if rung.method == method]
        observed, bound = (np.concatenate([getattr(rung, name) for rung in mine]) for name in ("probed_max", "bound"))
        rank = np.concatenate([np.full(len(rung.bound), rung.at) for rung in mine])
        shown = (observed > 0) & (bound > 0)
        points = axes.scatter(
            observed[shown], bound[shown], s=9, c=rank[shown], marker=marker, norm=norm, label=method.value, alpha=0.7
        )
    axes.set(xscale="log", yscale="log", xlabel="largest total variation on sampled queries", ylabel="tanh(eps / 2)")
    axes.autoscale(False)
    axes.axline((0.1, 0.1), (1, 1), color="grey", linewidth=0.8, label="equal")
    axes.set_title(f"{job.id}: guaranteed bound against observed error")
    axes.legend(loc="lower right")
    figure.colorbar(points, label="rank")
    return figure
