"""The heads of a branched network in several forms: forward and backward, the same in every form.

python -m benchmarks.heads [--network=resnet32] [--batch_size=128] [--branches=3] [--rounds=15]
    [--forms=dense,fused]

The heads begin where ONE's do. Vmapped forms have stacked parameters, and `model.branch_conv`
selects what `vmap` makes of a convolution; 'fused' is 'dense' without the barrier against fusion in
`one_jax/models/convolution.py`. Unrolled heads have their own parameters and are called one after
the other. All forms run in one process, in turn; a round times each form once. The table shows
medians, the median over the rounds of the ratio to unrolled, and seconds to compile.
"""

import contextlib
import operator
import time
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from one_jax import config as config_lib
from one_jax import models
from one_jax.models import convolution

CLASSES, IMAGE_SIZE = 100, 32
UNROLLED = 'unrolled'
FORMS = (UNROLLED, 'dense', 'fused', 'grouped')
WARM_UP = 2

NETWORK = flags.DEFINE_string('network', 'resnet32', 'A network for 32x32 images.')
BATCH_SIZE = flags.DEFINE_integer('batch_size', 128, 'Images in a batch.', 1)
BRANCHES = flags.DEFINE_integer('branches', 3, 'K, the number of heads.', 1)
ROUNDS = flags.DEFINE_integer('rounds', 15, 'Timings of each form.', 1)
TIMED = flags.DEFINE_list('forms', list(FORMS), f'Forms to time, besides {UNROLLED}.')
DTYPE = flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'), 'Of the computation.')


@contextlib.contextmanager
def fusion_barrier(form: str) -> Iterator[None]:
    """Removes the barrier from what is traced for the form 'fused'."""
    barrier = convolution._computed_once
    if form == 'fused':
        barrier = types.SimpleNamespace(bind=lambda x: x)
    convolution._dense_convolution.cache_clear()
    with mock.patch.object(convolution, '_computed_once', barrier):
        yield


def heads_gradient(form: str, share_stages: int) -> tuple[Callable[..., Any], Any, jax.Array]:
    """Returns the jitted gradient of a loss of all heads in one form, and its arguments.

    Returns:
      The function of (parameters, maps), the parameters (stacked, or a list for unrolled heads)
      and the trunk's maps [B, H, W, D]. All forms get the same numbers.
    """
    conv = 'grouped' if form == 'grouped' else 'dense'
    make_backbone = models.make_backbone(NETWORK.value, CLASSES, DTYPE.value, branch_conv=conv)
    trunk, head = make_backbone(end=share_stages), make_backbone(begin=share_stages)
    images = jnp.ones((BATCH_SIZE.value, IMAGE_SIZE, IMAGE_SIZE, 3))
    shape = jax.eval_shape(lambda: trunk.init_with_output(jax.random.key(0), images, True)[0])
    maps = jax.random.normal(jax.random.key(1), shape.shape, shape.dtype)
    init = jax.jit(lambda keys: jax.vmap(lambda key: head.init(key, maps, True))(keys))
    variables = init(jax.random.split(jax.random.key(2), BRANCHES.value))

    def head_loss(variables: Any, maps: jax.Array) -> jax.Array:
        outputs, updated = head.apply(variables, maps, train=True, mutable=['batch_stats'])
        # A train step computes the running statistics too.
        statistics = sum(x.sum() for x in jax.tree.leaves(updated))
        return (jax.nn.log_softmax(outputs.logits) ** 2).mean() + statistics

    def vmapped_loss(variables: Any, maps: jax.Array) -> jax.Array:
        return jax.vmap(head_loss, (0, None))(variables, maps).sum()

    def unrolled_loss(variables: list[Any], maps: jax.Array) -> jax.Array:
        return sum(head_loss(one, maps) for one in variables)

    if form == UNROLLED:
        variables = [jax.tree.map(operator.itemgetter(i), variables) for i in range(BRANCHES.value)]
    loss = unrolled_loss if form == UNROLLED else vmapped_loss
    return jax.jit(jax.value_and_grad(loss, (0, 1))), variables, maps


def main(_: list[str]) -> None:
    """Compiles every form, times them in turn and prints a table."""
    config = config_lib.default_config()
    config.model.update(name=NETWORK.value, num_branches=BRANCHES.value)
    share_stages = config_lib.resolve(config).model.share_stages
    runs, compile_seconds, losses = {}, {}, {}
    forms = [UNROLLED, *(form for form in FORMS[1:] if form in TIMED.value)]
    for form in forms:
        with fusion_barrier(form):
            function, *arguments = heads_gradient(form, share_stages)
            started = time.perf_counter()
            compiled = function.lower(*arguments).compile()
        compile_seconds[form] = time.perf_counter() - started
        runs[form] = (compiled, arguments)
        losses[form] = float(compiled(*arguments)[0])
        np.testing.assert_allclose(losses[form], losses[UNROLLED], rtol=2e-2)

    seconds = {form: [] for form in forms}
    for _ in range(WARM_UP + ROUNDS.value):
        for form, (compiled, arguments) in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            seconds[form].append(time.perf_counter() - started)

    seconds = {form: np.asarray(times[WARM_UP:]) for form, times in seconds.items()}
    device = jax.devices()[0]
    print(
        f'{NETWORK.value}, stages after {share_stages}, {BRANCHES.value} heads, batch of '
        f'{BATCH_SIZE.value}, {DTYPE.value}; {device.device_kind}, JAX {jax.__version__}\n'
    )
    print('| form | ms | to unrolled | compile, s |\n|---|---|---|---|')
    for form, times in seconds.items():
        ratio = np.median(times / seconds[UNROLLED])
        print(
            f'| {form} | {1000 * np.median(times):.1f} | {ratio:.2f} '
            f'| {compile_seconds[form]:.1f} |'
        )


if __name__ == '__main__':
    app.run(main)
