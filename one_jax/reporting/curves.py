"""Draws the curves of one run, and of several runs compared, as PNG."""

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

Records = Sequence[Mapping[str, Any]]
# Epochs [N] and values, [N] or [N, K].
Line = tuple[np.ndarray, np.ndarray]

# Okabe and Ito's palette, distinct for colour-blind readers.
COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#8C6D31')
BLACK, GREY = '#000000', '#777777'
# Entries of a training record that are neither loss terms nor accuracies.
NOT_LOSSES = {'step', 'epoch', 'split', 'distill_weight', 'gate_weights', 'learning_rate'}
NOT_LOSSES |= {'gradient_norm'}
MEASURES = ('_top1', '_top5', '_nll', '_ece')
EVALUATION_SPLITS = ('test', 'validation')
# Training records are averaged down to this many points: single batches are noisy.
MAX_POINTS = 150


def plot_run(records: Records, path: str | Path) -> None:
    """Writes `run_figure` as a PNG."""
    run_figure(records).savefig(path, dpi=150)


def compare_runs(runs: Mapping[str, Records], path: str | Path) -> None:
    """Writes `comparison_figure` as a PNG."""
    comparison_figure(runs).savefig(path, dpi=150)


def run_figure(records: Records) -> Figure:
    """Draws what the records have of accuracies, loss terms and gate weights over the epochs."""
    figure = Figure(figsize=(13, 4.2), layout='constrained')
    accuracy, losses, weights = figure.subplots(1, 3)
    _plot_accuracy(accuracy, records)
    _plot_losses(losses, records)
    _plot_weights(weights, records)
    return figure


def comparison_figure(runs: Mapping[str, Records]) -> Figure:
    """Draws the accuracy of several runs over their epochs in one plot.

    What a run deploys is a solid line; its teacher, or the mean ensemble if several branches have
    no teacher, is a dashed line of the same colour. Leaves out runs without evaluations; raises
    `UserError` if none is left.
    """
    runs = {name: records for name, records in runs.items() if evaluated(records)}
    if not runs:
        raise UserError('there are no curves to draw: no run was evaluated yet')
    figure = Figure(figsize=(7.5, 4.2 + 0.22 * len(runs)), layout='constrained')
    axes = figure.subplots()
    splits = {_evaluation_split(records) for records in runs.values()}
    _style(axes, f'{" or ".join(sorted(splits)).capitalize()} top-1 accuracy (%)')
    lines, dashed = [], set()
    for name, records in runs.items():
        split = _evaluation_split(records)
        lines.append(_series(records, split, 'deployed_top1'))
        colour = _line(axes, lines[-1], label=f'{name}: {_final(lines[-1])}')
        for label, line in list(_combined(records, split).items())[-1:]:
            lines.append(line)
            _line(axes, line, color=colour, linestyle='--', linewidth=1.1)
            dashed.add(label)
    _zoom_to_top(axes, lines)
    handles, _ = axes.get_legend_handles_labels()
    if dashed:
        label = f'dashed: {" or ".join(sorted(dashed))}'
        handles.append(Line2D([], [], color=GREY, linestyle='--', label=label))
    _legend(axes, ncols=1, handles=handles)
    return figure


def evaluated(records: Records) -> bool:
    """Returns whether the records have the accuracy of what is deployed."""
    split = _evaluation_split(records)
    return split is not None and len(_series(records, split, 'deployed_top1')[0]) > 0


def _plot_accuracy(axes: Axes, records: Records) -> None:
    split = _evaluation_split(records)
    _style(axes, f'{(split or "test").capitalize()} top-1 accuracy (%)')
    if split is None:
        axes.text(0.5, 0.5, 'not evaluated yet', ha='center', transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    epochs, branches = _series(records, split, 'branch_top1')
    lines = [(epochs, values) for values in branches.T] if len(epochs) else []
    for branch, line in enumerate(lines):
        _line(axes, line, label=f'branch {branch}: {_final(line)}')
    for label, line in _combined(records, split).items():
        colour = BLACK if label == 'teacher' else GREY
        _line(axes, line, color=colour, linestyle='--', label=f'{label}: {_final(line)}')
        lines.append(line)
    _zoom_to_top(axes, lines)
    _legend(axes)


def _plot_losses(axes: Axes, records: Records) -> None:
    """Draws the loss and each of its terms in the training records."""
    train = [record for record in records if record.get('split') == 'train']
    names = dict.fromkeys(name for record in train for name in record)
    terms = [name for name in names if name not in NOT_LOSSES and not name.endswith(MEASURES)]
    _style(axes, 'Training loss, mean over branches (nats)')
    positive = True
    for name in terms:
        epochs, values = _series(records, 'train', name, MAX_POINTS)
        mean = values.mean(axis=1)
        positive &= not (mean <= 0).any()
        label = name.replace('_', ' ').replace('cross entropy', 'cross-entropy')
        # The total lies beneath its terms, for a single term equals it.
        style = {'color': GREY, 'linewidth': 2.6} if name == 'loss' else {}
        _line(axes, (epochs, mean), label=label, **style)
    if terms:
        axes.set_yscale('log' if positive else 'linear')
        _legend(axes)


def _plot_weights(axes: Axes, records: Records) -> None:
    """Draws the mean gate weights, or else the distillation ramp, or else the learning rate."""
    epochs, weights = _series(records, 'train', 'gate_weights', MAX_POINTS)
    if len(epochs):
        _style(axes, 'Mean gate weight')
        for branch, values in enumerate(weights.T):
            _line(axes, (epochs, values), label=f'branch {branch}')
        axes.axhline(1 / weights.shape[1], color=GREY, linestyle=':', label='uniform')
        _legend(axes)
        return
    line, label = _series(records, 'train', 'distill_weight'), 'Distillation weight'
    if not len(line[0]):
        line, label = _series(records, 'train', 'learning_rate'), 'Learning rate'
    _style(axes, label)
    if len(line[0]):
        _line(axes, line)
        axes.set_ylim(bottom=0)


def _series(records: Records, split: str, name: str, max_points: int | None = None) -> Line:
    """Returns epochs [N] and the values [N, K] of one name; K = 1 for a scalar, null is NaN."""
    found = [r for r in records if r.get('split') == split and r.get(name) is not None]
    if not found:
        return np.empty(0), np.empty((0, 1))
    size = np.size(found[-1][name])
    found = [record for record in found if np.size(record[name]) == size]  # Others are damaged.
    epochs = np.array([record.get('epoch', record['step']) for record in found], float)
    values = np.array([np.atleast_1d(np.array(record[name], float)) for record in found])
    if max_points and len(epochs) > max_points:
        parts = np.array_split(np.arange(len(epochs)), max_points)
        epochs, values = (np.array([x[p].mean(axis=0) for p in parts]) for x in (epochs, values))
    return epochs, values


def _combined(records: Records, split: str) -> dict[str, Line]:
    """Returns the accuracy of the mean ensemble of several branches and of the teacher, if any."""
    lines = {'teacher': _series(records, split, 'teacher_top1')}
    if _series(records, split, 'branch_top1')[1].shape[1] > 1:
        lines = {'mean ensemble': _series(records, split, 'ensemble_top1'), **lines}
    return {label: line for label, line in lines.items() if len(line[0])}


def _evaluation_split(records: Records) -> str | None:
    """Returns the split evaluated most often, or None."""
    counts = Counter(r['split'] for r in records if r.get('split') in EVALUATION_SPLITS)
    return max(EVALUATION_SPLITS, key=counts.__getitem__) if counts else None


def _style(axes: Axes, ylabel: str) -> None:
    axes.set(xlabel='Epoch', ylabel=ylabel)
    axes.set_prop_cycle(color=COLOURS)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _line(axes: Axes, line: Line, **options: Any) -> str:
    """Draws a line, with markers if its points are few enough to tell apart; returns its colour.

    Without an option `color`, lines take `COLOURS` in turn.
    """
    marker = 'o' if len(line[0]) <= 12 else None
    width = 1.4 if len(line[0]) <= MAX_POINTS else 1.0
    (drawn,) = axes.plot(*line, marker=marker, markersize=3.5, **{'linewidth': width, **options})
    return drawn.get_color()


def _legend(axes: Axes, ncols: int = 2, **options: Any) -> None:
    """Adds a legend above the axes, where it covers no line."""
    place = {'loc': 'lower left', 'bbox_to_anchor': (0, 1), 'borderaxespad': 0.3}
    axes.legend(ncols=ncols, fontsize=8, frameon=False, columnspacing=1.2, **place, **options)


def _final(line: Line) -> str:
    return f'{line[1][-1].item():.2f} %'


def _zoom_to_top(axes: Axes, lines: Iterable[Line]) -> None:
    """Cuts off the low start of training, to make differences at the end visible."""
    lines = [line for line in lines if np.isfinite(line[1]).any()]
    if not lines:
        return
    last = max(epochs[-1] for epochs, _ in lines)
    late = np.concatenate([values[epochs >= 0.4 * last].ravel() for epochs, values in lines])
    if not np.isfinite(late).any():
        return
    top = max(np.nanmax(values) for _, values in lines)
    # The low end of the later part, but not a single evaluation that failed.
    bottom = np.nanpercentile(late, 10)
    margin = max(0.08 * (top - bottom), 0.2)
    axes.set_ylim(max(bottom - margin, 0), min(top + margin, 100.2))
