"""Frozen teachers in training: arguments of the step, never changed, the same after a resume."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from method_fixtures import kl_divergence
from student_fixtures import write_student
from training_fixtures import Setting, small_config

from one_jax.data import augment
from one_jax.errors import UserError
from one_jax.runtime import files
from one_jax.students.student import load_student
from one_jax.training import teachers, workdir
from one_jax.training.checkpoint import Checkpoints
from one_jax.training.run import Run
from one_jax.training.state import Progress
from one_jax.training.step import abstract_arguments


def make_setting(folders, **changes):
    fields = {
        'method.name': 'kd',
        'method.teachers': ','.join(map(str, folders)),
        'model.num_branches': None,
        'data.name': 'cifar10',
        'data.image_size': 0,
        'data.augment': 'none',
        'train.log_every': 1,
    }
    return Setting(**{**fields, **changes})


def write(folder, **changes):
    return write_student(folder, small_config(**{'data.name': 'cifar10'}), **changes)


def largest_constant(closed):
    """Returns the size of the largest array in a jaxpr and the jaxprs in it."""
    sizes = [np.size(constant) for constant in closed.consts]
    sizes += _literal_sizes(closed.jaxpr)
    return max(sizes, default=0)


def _literal_sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (np.size(v.val) for v in equation.invars if isinstance(v, core.Literal))
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, core.ClosedJaxpr | core.Jaxpr),
        ):
            if isinstance(value, core.ClosedJaxpr):
                yield largest_constant(value)
            elif isinstance(value, core.Jaxpr):
                yield from _literal_sizes(value)


def test_teacher_is_an_argument_and_no_constant_of_the_step(tmp_path):
    setting = make_setting([write(tmp_path / 'teacher', network='wrn10_1')])
    state = jax.eval_shape(setting.initial_state, jax.ShapeDtypeStruct((), 'uint32'))
    state, batch, *abstract = abstract_arguments(setting.experiment, setting.mesh, state)
    (variables,) = setting.teacher_variables
    largest = max(leaf.size for leaf in jax.tree.leaves(variables))
    as_argument = jax.make_jaxpr(setting.train_step)(state, batch, *abstract)
    assert largest_constant(as_argument) < 100 < largest
    # The same program with the teacher in its closure, to see that this finds constants.
    closed_over = jax.make_jaxpr(lambda s, b: setting.train_step(s, b, variables))(state, batch)
    assert largest_constant(closed_over) == largest


def test_teacher_is_evaluated_and_never_changed(tmp_path):
    setting = make_setting([write(tmp_path / 'teacher')])
    experiment, spec = setting.experiment, setting.experiment.spec
    images = augment.normalise(setting.host_batch(0)['image'], spec.mean, spec.std, jnp.float32)
    teacher = experiment.teachers[0]

    @jax.jit
    def logits(student, frozen, images):
        own, _ = experiment.network.apply(student, images, train=True, mutable=['batch_stats'])
        training, _ = teacher.network.apply(frozen, images, train=True, mutable=['batch_stats'])
        evaluated = teacher.network.apply(frozen, images, train=False)
        return own.logits[0], evaluated.logits, training.logits

    initial = setting.initial_state(np.uint32(0))
    before = jax.device_get(setting.teacher_variables)
    own, evaluated, training = logits(initial.variables, before[0], images)
    _, metrics = setting.run(range(3))
    evaluated, training = (
        kl_divergence(np.float64(frozen), np.float64(own), 4.0) for frozen in (evaluated, training)
    )
    assert np.ravel(metrics[0]['distillation'])[0] == pytest.approx(evaluated, rel=1e-3)
    assert abs(evaluated - training) > 0.05 * evaluated
    chex.assert_trees_all_equal(jax.device_get(setting.teacher_variables), before)
    chex.assert_trees_all_equal(before[0], load_student(tmp_path / 'teacher').variables)


def test_resume_with_other_teachers_is_an_error(tmp_path):
    """A teacher may have been moved; neither another one nor a second one may take part."""
    first, other = write(tmp_path / 'first'), write(tmp_path / 'other', seed=1)
    setting = make_setting([first])
    experiment, directory = setting.experiment, tmp_path / 'run'
    described = teachers.describe(experiment.method, experiment.teachers)
    assert described[0]['network'] == 'resnet8'
    state = {'w': jnp.zeros(3)}
    with Checkpoints(directory / workdir.CHECKPOINTS) as checkpoints:
        checkpoints.save(5, state, vars(Progress(teachers=described)))
    files.write_json(directory / workdir.CONFIG, experiment.config.to_dict())

    def restore(folders):
        experiment = make_setting(folders).experiment
        with Run(experiment, directory, None, {}, experiment.student_digests()) as run:
            return run.restore(state)

    # The checkpoint is one of an earlier version; then the workdir has the digests itself.
    for _ in range(2):
        for index, folders in enumerate(([other], [first, other])):
            with pytest.raises(UserError, match=rf'method\.teachers\[{index}\]: .* in the workdir'):
                restore(folders)
        files.write_json(directory / workdir.DATA, experiment.student_digests())
    assert restore([first.rename(tmp_path / 'moved')])[1] == 5
