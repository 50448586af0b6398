"""Tables and curves of runs, and the report command."""

import json
import statistics
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from one_jax import report
from one_jax.errors import UserError
from one_jax.reporting import curves, runs, tables

BRANCHES = {0: [97.0, 97.2, 97.7], 1: [96.0, 96.3, 96.9], 2: [98.0, 98.5, 98.1]}


def make_result(name='run', seed=0, branches=(97.0, 97.2, 97.7), **fields):
    """The content of a result.json."""
    plain = len(branches) == 1
    teacher = None if plain else max(branches) + 0.5
    outputs = {'teacher': teacher, 'ensemble': max(branches) + 0.25, 'deployed': branches[0]}
    result = {
        'name': name,
        'method': 'plain' if plain else 'one',
        'network': 'resnet8',
        'dataset': 'mnist5k',
        'seed': seed,
        'step': 100,
        'epochs': 4.0,
        'split': 'test',
        'branch_top1': list(branches),
        'branch_top5': [99.5] * len(branches),
        'branch_nll': [0.12345] * len(branches),
        'branch_ece': [1.5] * len(branches),
        'deployed': 'branch 0',
        'parameters': 77_850 if plain else 1_193_189,
        'deployed_parameters': 77_850,
        'flops': 25e6 if plain else 40e6,
        'deployed_flops': 25e6,
        'seconds': 100.0 + seed,
    }
    for output, top1 in outputs.items():
        values = {'top1': top1, 'top5': 99.5, 'nll': 0.1, 'ece': 1.25}
        for measure, value in values.items():
            result[f'{output}_{measure}'] = None if top1 is None else value
    return result | fields


def make_records(epochs=4, branches=3, split='test'):
    """The records of a run whose teacher is half a point above the branches."""
    records = []
    for epoch in range(1, epochs + 1):
        accuracy = [90.0 + epoch + 0.1 * branch for branch in range(branches)]
        train = {
            'loss': 4.0 / epoch,
            'branch_cross_entropy': [1.0 / epoch] * branches,
            'learning_rate': 0.1,
            'gradient_norm': 1.0,
            'branch_top1': accuracy,
        }
        test = {'branch_top1': accuracy, 'deployed_top1': accuracy[0]}
        test['ensemble_top1'] = accuracy[0]
        if branches > 1:
            train |= {'distillation': [0.5 / epoch] * branches, 'distill_weight': epoch / epochs}
            train |= {'gate_weights': [1 / branches] * branches, 'teacher_top1': 95.0}
            test |= {'teacher_top1': accuracy[-1] + 0.5, 'ensemble_top1': accuracy[-1] + 0.25}
        place = {'step': 25 * epoch, 'epoch': float(epoch)}
        records += [place | {'split': 'train'} | train, place | {'split': split} | test]
    return records


def make_workdir(root, result, records=(), **fields):
    """A workdir; metrics.jsonl has a damaged tail, and a finished run has a result.json."""
    directory = root / result['name']
    directory.mkdir(parents=True)
    config = {'seed': result['seed'], 'optimizer': {'milestones': [0.5, 0.75]}}
    config['model'] = {'name': result['network'], 'num_branches': len(result['branch_top1'])}
    config['method'] = {'name': result['method'], 'temperature': 3.0}
    config['data'] = {'name': result['dataset'], 'data_dir': '', 'generated_examples': 0}
    for field, value in fields.items():
        group, _, name = field.rpartition('.')
        (config[group] if group else config)[name] = value
    (directory / 'config.json').write_text(json.dumps(config))
    lines = [json.dumps(record) + '\n' for record in records]
    (directory / 'metrics.jsonl').write_text(''.join(lines) + '{"step": 1000, "ep')
    if 'step' in result:
        (directory / 'result.json').write_text(json.dumps(result))
    return directory


def make_unfinished(root, name='unfinished', records=()):
    result = {'name': name, 'network': 'resnet8', 'dataset': 'mnist5k', 'method': 'one'}
    return make_workdir(root, result | {'branch_top1': [0.0] * 3, 'seed': 0}, records)


def row_of(table, name):
    """The cells of the first line that begins with `name`."""
    (line, *_) = [line for line in table.splitlines() if line.startswith(name)]
    return line.removeprefix(name).split()


def test_format_table_aligns_words_left_and_numbers_right():
    rows = [
        {'name': 'a', 'value': 1.0, 'note': 'x'},
        {'name': 'longer', 'value': 12.346, 'note': None},
        {'name': 'b', 'value': None, 'note': 'two\nlines'},
    ]
    assert tables.format_table(rows, ['name', 'value', 'note', 'absent']).splitlines() == [
        'name    value  note   absent',
        '------  -----  -----  ------',
        'a        1.00  x',
        'longer  12.35',
        'b              two',
        '               lines',
    ]


def test_markdown_table_escapes_bars_and_breaks_lines():
    rows = [{'name': 'a|b', 'value': '1\n2'}]
    expected = ['| name | value |', '| --- | --- |', '| a\\|b | 1<br>2 |']
    assert tables.markdown_table(rows, ['name', 'value']).splitlines() == expected


def test_run_table_of_branches_has_a_row_for_each_output():
    table = tables.run_table(make_result())
    assert 'method one, network resnet8, dataset mnist5k, split test, seed 0' in table
    assert row_of(table, 'branch 0 (deployed)') == ['97.00', '99.50', '0.1235', '1.50']
    assert row_of(table, 'branch 2') == ['97.70', '99.50', '0.1235', '1.50']
    spread = statistics.stdev([97.0, 97.2, 97.7])
    assert row_of(table, 'branch mean')[:3] == ['97.30', '±', f'{spread:.2f}']
    assert row_of(table, 'teacher') == ['98.20', '99.50', '0.1000', '1.25']
    assert row_of(table, 'mean ensemble')[0] == '97.95'
    deployed = tables.run_table(make_result(deployed='ensemble'))
    assert row_of(deployed, 'mean ensemble (deployed)')[0] == '97.95'


def test_run_table_of_one_branch_or_a_bare_record_leaves_rows_out():
    table = tables.run_table(make_result(branches=(96.5,)))
    labels = [line.split('  ')[0] for line in table.splitlines()[3:]]
    assert labels == ['branch 0 (deployed)']
    bare = tables.run_table({'branch_top1': [96.5, 97.5], 'split': 'test'})
    assert row_of(bare, 'branch 1') == ['97.50']
    assert 'teacher' not in bare


def test_report_of_seeds_adds_their_mean(tmp_path, capsys):
    """Seeds on machines with other paths are together; another setting is apart."""
    directories = [
        make_workdir(tmp_path, make_result(f'one{seed}', seed, BRANCHES[seed]), **machine)
        for seed, machine in [(0, {}), (1, {'data.data_dir': '/elsewhere'}), (2, {})]
    ]
    other = make_result('one_hot', 3, [50.0, 50.0, 50.0])
    directories.insert(1, make_workdir(tmp_path, other, **{'method.temperature': 9.0}))
    directories.append(make_workdir(tmp_path, make_result('alone', 0, [96.5])))
    report.main(list(map(str, directories)))
    table = capsys.readouterr().out
    assert table.splitlines()[0] == 'mnist5k, resnet8'
    assert row_of(table, 'one0')[:6] == ['one', '1.19M', '40.0', '97.30', '±', '0.36']
    assert row_of(table, 'alone')[:5] == ['plain', '77.8k', '25.0', '96.50', '96.50']
    means = [np.mean(values) for values in BRANCHES.values()]
    expected = f'{np.mean(means):.2f} ± {np.std(means, ddof=1):.2f}'
    seeds_row = row_of(table, 'mean over seeds')
    assert seeds_row[3:6] == expected.split()
    best = np.mean([max(values) for values in BRANCHES.values()])
    assert seeds_row[6:10] == [f'{best + 0.5:.2f}', f'{best + 0.25:.2f}', '97.00', 'n=3']
    # Below it are the deviations of teacher, ensemble and deployed; the other setting has no mean.
    lines = table.splitlines()
    deviations = lines[[line.startswith('mean over') for line in lines].index(True) + 1]
    deployed = np.std([values[0] for values in BRANCHES.values()], ddof=1)
    assert deviations.split('±')[-1].strip() == f'{deployed:.2f}'
    assert table.count('mean over seeds') == 1


def test_report_of_one_seed_twice_has_no_mean(tmp_path, capsys):
    twice = [make_workdir(tmp_path, make_result(name, 5)) for name in ('a', 'b')]
    report.main([str(twice[0]), str(twice[1]), str(twice[1])])
    table = capsys.readouterr().out
    assert 'mean over seeds' not in table
    assert table.count('1 m 45 s') == 2


def test_report_of_unfinished_runs_has_their_steps(tmp_path, capsys):
    started = make_unfinished(tmp_path, 'started')
    stopped = make_unfinished(tmp_path, 'stopped', make_records(epochs=3))
    report.main([str(started), str(stopped)])
    table = capsys.readouterr().out
    assert row_of(table, 'started') == ['one', '0', 'unfinished']
    assert row_of(table, 'stopped') == ['one', '0', 'unfinished']
    assert [line.strip() for line in table.splitlines() if 'step' in line] == ['step 0', 'step 75']


def test_report_of_long_names_fits_in_120_columns(tmp_path, capsys):
    """Five branches, a long name, different long networks, two data sets."""
    names = ['with_a_name_that_is_far_too_long_for_one_line_of_a_table_5', 'short']
    five = make_result(names[0], branches=[97.0] * 5, network='resnet110_bottleneck12')
    results = [five, make_result(names[1]), make_result('other', dataset='cifar100')]
    directories = [make_workdir(tmp_path, result) for result in results]
    generated = make_workdir(tmp_path, make_result('made'), **{'data.generated_examples': 64})
    report.main([str(directory) for directory in [*directories, generated]])
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 120
    assert 'with_a' in table
    assert 'table_5 ' in table
    headings = [line for line in table.splitlines() if line.startswith(('mnist5k', 'cifar100'))]
    # Generated images are not the data set whose shape they have.
    assert headings == ['mnist5k', 'cifar100, resnet8', 'mnist5k (generated images), resnet8']
    assert '  resnet110_bottleneck12' in table


def test_read_runs_with_equal_names_uses_their_paths(tmp_path):
    directories = [make_workdir(tmp_path / place, make_result()) for place in ('a', 'b')]
    assert [run.name for run in runs.read_runs(directories)] == list(map(str, directories))


def test_report_with_output_writes_markdown_and_curves(tmp_path, capsys):
    plain = make_workdir(tmp_path, make_result('plain', 0, [96.5]), make_records(branches=1))
    one = make_workdir(tmp_path, make_result('one', 0), make_records())
    output = tmp_path / 'new' / 'report'
    report.main([str(plain), str(one), f'--output={output}'])
    text = (output / 'report.md').read_text()
    assert '## mnist5k, resnet8' in text
    assert '| one | one | 1.19M<br>77.8k | 40.0<br>25.0 | 97.30 ± 0.36<br>97.00' in text
    assert '(curves.png)' in text
    assert matplotlib.image.imread(output / 'curves.png').std() > 0.01
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='--output'):
        report.main([str(one), f'--output={tmp_path / "file" / "below"}'])


def test_report_without_evaluations_draws_no_curves(tmp_path):
    report.main([str(make_unfinished(tmp_path)), f'--output={tmp_path}'])
    assert 'unfinished<br>step 0' in (tmp_path / 'report.md').read_text()
    assert not (tmp_path / 'curves.png').exists()


@pytest.mark.parametrize('content', [None, '{"name": ', '[]'])
def test_read_run_of_no_workdir_is_an_error_with_its_path(tmp_path, content):
    if content is not None:
        (tmp_path / 'result.json').write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)) as raised:
        report.main([str(tmp_path)])
    assert '\n' not in str(raised.value)


def lines_of(axes):
    """The labelled lines, {label: (epochs, values)}."""
    return {
        line.get_label(): line.get_data()
        for line in axes.get_lines()
        if not line.get_label().startswith('_')
    }


def test_run_figure_draws_accuracies_losses_and_gate_weights():
    records = make_records(epochs=4)
    records[-1]['branch_top1'][1] = None
    accuracy, losses, weights = curves.run_figure(records).axes
    lines = lines_of(accuracy)
    assert set(lines) == {
        'branch 0: 94.00 %',
        'branch 1: nan %',
        'branch 2: 94.20 %',
        'mean ensemble: 94.45 %',
        'teacher: 94.70 %',
    }
    epochs, values = lines['teacher: 94.70 %']
    np.testing.assert_allclose(epochs, [1, 2, 3, 4])
    np.testing.assert_allclose(values, [91.7, 92.7, 93.7, 94.7])
    assert set(lines_of(losses)) == {'loss', 'branch cross-entropy', 'distillation'}
    np.testing.assert_allclose(lines_of(losses)['distillation'][1], 0.5 / epochs)
    assert losses.get_yscale() == 'log'
    assert set(lines_of(weights)) == {'branch 0', 'branch 1', 'branch 2', 'uniform'}


def test_run_figure_of_any_method_draws_its_terms():
    """Unknown terms of either sign; the ramp without a gate, the learning rate without a ramp."""
    records = make_records()
    for record in records:
        record.pop('gate_weights', None)
        if record['split'] == 'train':
            record['margin_to_peers'] = -0.5
    _, losses, weights = curves.run_figure(records).axes
    assert 'margin to peers' in lines_of(losses)
    assert losses.get_yscale() == 'linear'
    assert weights.get_ylabel() == 'Distillation weight'
    accuracy, _, weights = curves.run_figure(make_records(branches=1)).axes
    assert list(lines_of(accuracy)) == ['branch 0: 94.00 %']
    assert weights.get_ylabel() == 'Learning rate'


def test_run_figure_of_a_long_run_averages_its_records():
    """Points are averaged in groups and drawn at the mean epoch."""
    records = make_records(epochs=1000)
    _, losses, _ = curves.run_figure(records).axes
    epochs, values = lines_of(losses)['loss']
    assert len(epochs) == curves.MAX_POINTS
    first = np.arange(1, 8)
    np.testing.assert_allclose((epochs[0], values[0]), (first.mean(), (4 / first).mean()))


def test_run_figure_zooms_to_the_end_of_training():
    records = make_records(epochs=100)
    for record in records:
        if record['epoch'] < 20:
            record['branch_top1'] = [10.0, 10.0, 10.0]
        else:
            record['branch_top1'] = [97.0 + 0.01 * record['epoch']] * 3
        record['teacher_top1'] = record['ensemble_top1'] = record['branch_top1'][0]
    accuracy, _, _ = curves.run_figure(records).axes
    bottom, top = accuracy.get_ylim()
    assert 96 < bottom < 97.4
    assert 98 < top < 98.5


def test_comparison_figure_draws_evaluated_runs_and_their_teachers():
    by_name = {
        'one': make_records(),
        'plain': make_records(branches=1),
        'held out': make_records(split='validation'),
        'not yet': make_records()[:1],
    }
    (axes,) = curves.comparison_figure(by_name).axes
    lines = lines_of(axes)
    assert list(lines) == ['one: 94.00 %', 'plain: 94.00 %', 'held out: 94.00 %']
    np.testing.assert_allclose(lines['one: 94.00 %'][1], [91, 92, 93, 94])
    # Three runs, of which two have a teacher.
    assert len(axes.get_lines()) == 5
    assert axes.get_ylabel() == 'Test or validation top-1 accuracy (%)'
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [*lines, 'dashed: teacher']


def test_run_figure_draws_the_split_evaluated_most_often():
    """With held-out images the test split is evaluated once, at the end."""
    records = [*make_records(split='validation'), make_records()[-1]]
    accuracy, _, _ = curves.run_figure(records).axes
    assert accuracy.get_ylabel() == 'Validation top-1 accuracy (%)'


def test_curves_are_written_as_png_or_an_error(tmp_path):
    curves.plot_run(make_records()[:1], tmp_path / 'run.png')
    curves.compare_runs({'one': make_records()}, tmp_path / 'runs.png')
    for name in ('run.png', 'runs.png'):
        assert matplotlib.image.imread(tmp_path / name).std() > 0.01
    with pytest.raises(UserError, match='evaluated'):
        curves.compare_runs({'one': make_records()[:1]}, tmp_path / 'none.png')
    assert not (tmp_path / 'none.png').exists()


def test_reporting_imports_only_what_it_needs():
    """The tables start without JAX and matplotlib, the curves without pyplot."""
    code = (
        'import sys; from one_jax import report\n'
        'heavy = {"jax", "flax", "tensorflow_datasets", "one_jax.config", "matplotlib"}\n'
        'assert not heavy & set(sys.modules), heavy & set(sys.modules)\n'
        'from one_jax.reporting import curves\n'
        'curves.run_figure([{"step": 1, "epoch": 1.0, "split": "train", "loss": 1.0}])\n'
        'assert "matplotlib.pyplot" not in sys.modules and "jax" not in sys.modules'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_report_of_an_earlier_versions_workdir_groups_it_with_the_new(tmp_path):
    """Fields are read under their new names, and removed ones are ignored."""
    old = {'model.members': '', 'model.keep_activations': 'all', 'seeds': []}
    new = {'model.branch_networks': '', 'model.remat': 'all'}
    directories = [
        make_workdir(tmp_path, make_result(name, seed), **fields)
        for seed, (name, fields) in enumerate({'old': old, 'new': new}.items())
    ]
    assert 'n=2' in tables.runs_table(runs.read_runs(directories))


# Fields of a result.json, values that no result has, and words of the error.
BAD_FIELDS = [
    ('seed', 'x', 'a number, or null'),
    ('seed', [], 'a number, or null'),
    ('seed', True, 'a number, or null'),
    ('name', 3, 'text'),
    ('method', None, 'text'),
    ('network', ['resnet8'], 'text'),
    ('dataset', {}, 'text'),
    ('deployed', 1, 'text'),
    ('parameters', '77k', 'a number, or null'),
    ('flops', 10**400, 'a number, or null'),
    ('seconds', [1], 'a number, or null'),
    ('branch_top1', 97.0, 'a list of numbers'),
    ('branch_top1', [97.0, 'x', 97.7], 'a list of numbers'),
    ('branch_top1', [97.0], 'as many in each list'),
    ('branch_nll', [[0.1]], 'a list of numbers'),
    ('teacher_top1', '97', 'a number, or null'),
    ('ensemble_ece', {'a': 1}, 'a number, or null'),
    ('branch_network', ['a', 'b', 'c'], 'as many in each list'),
    ('branch_network', [1, 2, 3], 'a list of names'),
    ('teachers', ['x'], 'a list of objects'),
]


@pytest.mark.parametrize(('field', 'value', 'words'), BAD_FIELDS)
def test_read_run_with_a_result_of_another_kind_is_one_line(tmp_path, field, value, words):
    (tmp_path / 'result.json').write_text(json.dumps(make_result() | {field: value}))
    with pytest.raises(UserError, match=words) as error:
        report.main([str(tmp_path)])
    text = str(error.value)
    assert f"result.json' is damaged: {'branches' if 'each' in words else field}=" in text
    assert text.isprintable()
    assert len(text) < 600


@pytest.mark.parametrize('field', ['seed', 'method.name', 'model.name', 'data.name'])
def test_read_run_with_a_config_of_another_kind_is_one_line(tmp_path, field):
    directory = make_workdir(tmp_path, make_result(), **{field: [1]})
    with pytest.raises(UserError, match=rf"config\.json' is damaged: {field}=\[1\]"):
        report.main([str(directory)])


def test_report_of_diverged_runs_and_control_characters_is_printed(tmp_path, capsys):
    """Measures of a run that diverged are null; a name must not change the terminal."""
    for seed in (0, 1):
        directory = tmp_path / f'e\x1b[31mvil\n{seed}'
        directory.mkdir()
        result = make_result(seed=seed, branch_top1=[None, 97.0, None], name=directory.name)
        (directory / 'result.json').write_text(json.dumps(result))
    report.main([*map(str, tmp_path.iterdir()), f'--output={tmp_path / "report"}'])
    text = capsys.readouterr().out
    assert '\x1b' not in text
    assert 'e\\x1b[31mvil\\n0' in text
    assert 'n=2' in text


def test_run_figure_of_odd_records_leaves_out_what_cannot_be_drawn():
    """Another number of branches, no finite value at the end, an epoch below zero."""
    found = make_records()
    found[0]['branch_cross_entropy'] = [1.0]
    found[-1]['epoch'] = -1.0
    for record in found[2:]:
        for name in ('branch_top1', 'teacher_top1', 'ensemble_top1'):
            if name in record:
                record[name] = [None] * 3 if name == 'branch_top1' else None
    _, losses, _ = curves.run_figure(found).axes
    assert len(lines_of(losses)['branch cross-entropy'][0]) == 3
