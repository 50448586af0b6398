"""Curves of one run, and of several runs compared, as PNG."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from one_jax.errors import UserError
from one_jax.metrics import read_records

__all__ = ['compare_runs', 'comparison_figure', 'plot_run', 'read_records', 'run_figure']

Records = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#8C6D31')
BLACK, GREY = '#000000', '#777777'
# What the branches are together: label and colour.
TOGETHER = {'ensemble': ('mean ensemble', GREY), 'teacher': ('teacher', BLACK)}
# In a training record, what is neither a loss term nor an accuracy.
NOT_LOSSES = {'step', 'epoch', 'split', 'distill_weight', 'gate_weights', 'learning_rate'}
NOT_LOSSES |= {'gradient_norm'}
EVALUATION_SPLITS = ('test', 'validation')
MEASURES = ('_top1', '_top5', '_nll', '_ece')
# Training records are averaged down to this many points: single batches are noise.
MAX_POINTS = 150


def _series(
    records: Records, split: str, name: str, max_points: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Epochs [N], and the values [N, K] of one name (K = 1 for a scalar); null becomes NaN."""
    found = [r for r in records if r.get('split') == split and r.get(name) is not None]
    if not found:
        return np.empty(0), np.empty((0, 1))
    epochs = np.array([record.get('epoch', record['step']) for record in found], float)
    values = np.array([np.atleast_1d(np.array(record[name], float)) for record in found])
    if max_points and len(epochs) > max_points:
        parts = np.array_split(np.arange(len(epochs)), max_points)
        epochs = np.array([epochs[part].mean() for part in parts])
        values = np.array([values[part].mean(axis=0) for part in parts])
    return epochs, values


def _evaluation_split(records: Records) -> str | None:
    """The split that was evaluated most often; None where there was no evaluation."""
    counts = Counter(r['split'] for r in records if r.get('split') in EVALUATION_SPLITS)
    return max(EVALUATION_SPLITS, key=counts.__getitem__) if counts else None


def evaluated(records: Records) -> bool:
    """Whether the records say how good what is deployed was."""
    split = _evaluation_split(records)
    return split is not None and len(_series(records, split, 'deployed_top1')[0]) > 0


def _style(axes: Axes, ylabel: str) -> None:
    axes.set_xlabel('Epoch')
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _line(axes: Axes, epochs: np.ndarray, values: np.ndarray, **options: Any) -> None:
    """A line, with a marker at each point where they are few enough to tell apart."""
    marker = 'o' if len(epochs) <= 12 else None
    width = 1.4 if len(epochs) <= MAX_POINTS else 1.0
    axes.plot(epochs, values, marker=marker, markersize=3.5, **{'linewidth': width, **options})


def _legend(axes: Axes, columns: int, **options: Any) -> None:
    """A legend above the axes, where it covers no line."""
    place = {'loc': 'lower left', 'bbox_to_anchor': (0, 1), 'borderaxespad': 0.3}
    axes.legend(ncols=columns, fontsize=8, frameon=False, columnspacing=1.2, **place, **options)


def _final(values: np.ndarray) -> str:
    """The last value, for the legend: that is what one wants to compare."""
    return f'{values[-1].item():.2f} %'


def _zoom_to_top(axes: Axes, lines: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Cuts off the start of training below, so that differences at the end can be seen."""
    lines = [(epochs, values) for epochs, values in lines if np.isfinite(values).any()]
    if not lines:
        return
    last = max(epochs[-1] for epochs, _ in lines)
    late = np.concatenate([values[epochs >= 0.4 * last].ravel() for epochs, values in lines])
    top = max(np.nanmax(values) for _, values in lines)
    # The low end of the later part, but not a single evaluation that went wrong.
    bottom = np.nanpercentile(late, 10)
    margin = max(0.08 * (top - bottom), 0.2)
    axes.set_ylim(max(bottom - margin, 0), min(top + margin, 100.2))


def _plot_accuracy(axes: Axes, records: Records) -> None:
    split = _evaluation_split(records)
    _style(axes, f'{(split or "test").capitalize()} top-1 accuracy (%)')
    if split is None:
        axes.text(0.5, 0.5, 'not evaluated yet', ha='center', transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    epochs, branches = _series(records, split, 'branch_top1')
    lines = [(epochs, branches)]
    for branch, values in enumerate(branches.T if len(epochs) else []):
        colour = COLOURS[branch % len(COLOURS)]
        _line(axes, epochs, values, color=colour, label=f'branch {branch}: {_final(values)}')
    for name, (label, colour) in TOGETHER.items():
        # The mean of one branch is that branch.
        if name == 'ensemble' and branches.shape[1] == 1:
            continue
        epochs, values = _series(records, split, f'{name}_top1')
        if len(epochs):
            label = f'{label}: {_final(values)}'
            _line(axes, epochs, values, color=colour, linestyle='--', label=label)
            lines.append((epochs, values))
    _zoom_to_top(axes, lines)
    _legend(axes, columns=2)


def _plot_losses(axes: Axes, records: Records) -> None:
    """The loss and each of its terms in the training records."""
    train = [record for record in records if record.get('split') == 'train']
    names = dict.fromkeys(name for record in train for name in record)
    terms = [name for name in names if name not in NOT_LOSSES and not name.endswith(MEASURES)]
    _style(axes, 'Training loss, mean over branches (nats)')
    colours = itertools.cycle(COLOURS)
    positive = True
    for name in terms:
        epochs, values = _series(records, 'train', name, MAX_POINTS)
        mean = values.mean(axis=1)
        positive &= not (mean <= 0).any()
        label = name.replace('_', ' ').replace('cross entropy', 'cross-entropy')
        # The total lies beneath: where there is one term only, it is that term.
        style = {'color': GREY, 'linewidth': 2.6} if name == 'loss' else {'color': next(colours)}
        _line(axes, epochs, mean, label=label, **style)
    if terms:
        axes.set_yscale('log' if positive else 'linear')
        _legend(axes, columns=2)


def _plot_weights(axes: Axes, records: Records) -> None:
    """The mean gate weights, or else the distillation ramp, or else the learning rate."""
    epochs, weights = _series(records, 'train', 'gate_weights', MAX_POINTS)
    if len(epochs):
        _style(axes, 'Mean gate weight')
        for branch, values in enumerate(weights.T):
            colour = COLOURS[branch % len(COLOURS)]
            _line(axes, epochs, values, color=colour, label=f'branch {branch}')
        axes.axhline(1 / weights.shape[1], color=GREY, linestyle=':', label='uniform')
        _legend(axes, columns=2)
        return
    labels = {'distill_weight': 'Weight of the distillation', 'learning_rate': 'Learning rate'}
    for name, label in labels.items():
        epochs, values = _series(records, 'train', name)
        if len(epochs):
            _style(axes, label)
            _line(axes, epochs, values, color=COLOURS[0])
            axes.set_ylim(bottom=0)
            return
    _style(axes, labels['learning_rate'])


def run_figure(records: Records) -> Figure:
    """Accuracies, loss terms and gate weights of a run over its epochs.

    Args:
      records: of its metrics.jsonl; any measure may be missing.

    Raises:
      UserError: there are no records.
    """
    if not records:
        raise UserError('there are no curves to draw: the run has no records yet')
    figure = Figure(figsize=(13, 4.2), layout='constrained')
    accuracy, losses, weights = figure.subplots(1, 3)
    _plot_accuracy(accuracy, records)
    _plot_losses(losses, records)
    _plot_weights(weights, records)
    return figure


def comparison_figure(runs: Mapping[str, Records]) -> Figure:
    """The accuracy of several runs over their epochs, in one axes.

    Of each run, what is deployed is a solid line; the teacher, or without one the mean ensemble of
    several branches, is a dashed line of the same colour.

    Args:
      runs: records by run name; runs that were not evaluated are left out.

    Raises:
      UserError: no run was evaluated yet.
    """
    runs = {name: records for name, records in runs.items() if evaluated(records)}
    if not runs:
        raise UserError('there are no curves to draw: no run was evaluated yet')
    figure = Figure(figsize=(7.5, 4.2 + 0.22 * len(runs)), layout='constrained')
    axes = figure.subplots()
    lines, dashed = [], set()
    for (name, records), colour in zip(runs.items(), itertools.cycle(COLOURS), strict=False):
        split = _evaluation_split(records)
        lines.append(_series(records, split, 'deployed_top1'))
        _line(axes, *lines[-1], color=colour, label=f'{name}: {_final(lines[-1][1])}')
        together = _together(records, split)
        if together:
            lines.append(_series(records, split, f'{together}_top1'))
            _line(axes, *lines[-1], color=colour, linestyle='--', linewidth=1.1)
            dashed.add(TOGETHER[together][0])
    splits = {_evaluation_split(records) for records in runs.values()}
    _style(axes, f'{" or ".join(sorted(splits)).capitalize()} top-1 accuracy (%)')
    _zoom_to_top(axes, lines)
    handles, _ = axes.get_legend_handles_labels()
    if dashed:
        label = f'dashed: {" or ".join(sorted(dashed))}'
        handles.append(Line2D([], [], color=GREY, linestyle='--', label=label))
    _legend(axes, columns=1, handles=handles)
    return figure


def _together(records: Records, split: str) -> str | None:
    """What the branches are together: 'teacher', or else 'ensemble'; None for a single branch."""
    if len(_series(records, split, 'teacher_top1')[0]):
        return 'teacher'
    if _series(records, split, 'branch_top1')[1].shape[1] > 1:
        return 'ensemble'
    return None


def plot_run(records: Records, path: str | Path) -> None:
    """Writes `run_figure` as a PNG."""
    run_figure(records).savefig(path, dpi=150)


def compare_runs(runs: Mapping[str, Records], path: str | Path) -> None:
    """Writes `comparison_figure` as a PNG."""
    comparison_figure(runs).savefig(path, dpi=150)
