"""SGD with momentum and coupled weight decay, and its learning-rate schedules."""

from typing import Any

import optax


def make_schedule(
    config: Any, steps_per_epoch: int, total_steps: int, batch_size: int = 0
) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    Args:
      config: the group `optimizer` of the configuration.
      steps_per_epoch: converts the length of the warm-up.
      total_steps: milestones and cosine are relative to it.
      batch_size: scales the rate if `reference_batch_size` is set (Goyal et al. 2017, section 2.1).
    """
    peak = config.learning_rate
    if config.reference_batch_size:
        peak *= batch_size / config.reference_batch_size
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == 'step':
        # Two milestones of a very short run may round to one step, where both factors apply.
        factors: dict[int, float] = {}
        for milestone in config.milestones:
            step = round(milestone * total_steps)
            factors[step] = factors.get(step, 1.0) * config.decay_factor
        from_start = optax.piecewise_constant_schedule(peak, factors)

        # Milestones count from the first step, the joined schedule from the end of the warm-up.
        def schedule(count: Any) -> Any:
            return from_start(count + warmup_steps)

    elif config.schedule == 'cosine':
        schedule = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup_steps))
    else:
        schedule = optax.constant_schedule(peak)
    if not warmup_steps:
        return schedule
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, schedule], [warmup_steps])


def make_optimizer(config: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """PyTorch's SGD: gradient plus weight decay on all parameters, then momentum, then the rate."""
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule, momentum=config.momentum or None, nesterov=config.nesterov),
    )
