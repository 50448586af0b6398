"""SGD with momentum and coupled weight decay, and its learning-rate schedules."""

from typing import Any

import optax


def make_schedule(
    config: Any, steps_per_epoch: int, total_steps: int, batch_size: int = 0
) -> optax.Schedule:
    """The learning rate of every step.

    Args:
      config: the group `optimizer` of the configuration.
      steps_per_epoch: for the length of the warm-up.
      total_steps: the run's, which the milestones and the cosine are shares of.
      batch_size: of the run; the rate is scaled to it if `reference_batch_size` is set (Goyal et
        al. 2017, section 2.1).
    """
    peak = config.learning_rate
    if config.reference_batch_size:
        peak *= batch_size / config.reference_batch_size
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == 'step':
        # Two milestones of a very short run may round to one step: then both factors apply there.
        factors: dict[int, float] = {}
        for milestone in config.milestones:
            step = round(milestone * total_steps)
            factors[step] = factors.get(step, 1.0) * config.decay_factor
        from_start = optax.piecewise_constant_schedule(peak, factors)
        # The milestones count from the first step; after the join, steps count from the warm-up's
        # end.
        schedule = lambda count: from_start(count + warmup_steps)  # noqa: E731
    elif config.schedule == 'cosine':
        schedule = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup_steps))
    else:
        schedule = optax.constant_schedule(peak)
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, schedule], [warmup_steps]) if warmup_steps else schedule


def make_optimizer(config: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD as PyTorch's: gradient + weight decay on all parameters, then momentum, then the rate.

    Args:
      config: the group `optimizer` of the configuration.
      schedule: the learning rate.
    """
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule, momentum=config.momentum or None, nesterov=config.nesterov),
    )
