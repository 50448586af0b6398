"""ResNet-8 on 5,000 MNIST digits with MEAL V2, without its discriminator.

Source: Shen, Savvides, "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet
    without Tricks", 2020. Trained here by the recipe of the demo, like all methods.
Recipe: 12 epochs of SGD, Nesterov momentum 0.9, batch 100, rate 0.1 to 0 by a cosine, weight decay
    5e-4; pad 2 and crop, no flip; one network that learns the mean of its frozen teachers'
    probabilities and no labels. 78,042 parameters deployed (78,042 in training).
Expect: docs/methods.md has the table of `make methods`, made with `:few`, the machine and the
    seeds.
Teachers: any exported students of the same data; three networks, say:
    python -m one_jax.main --config=configs/mnist5k_resnet8.py:plain --config.model.name=resnet20 \\
        --workdir=runs/mnist5k_resnet20
    python -m one_jax.main --config=configs/mnist5k_resnet8.py:plain --config.model.name=wrn10_1 \\
        --workdir=runs/mnist5k_wrn10_1
    python -m one_jax.main --config=configs/mnist5k_resnet8.py:plain \\
        --config.model.name=densenet16_4 --workdir=runs/mnist5k_densenet16_4
    for name in resnet20 wrn10_1 densenet16_4; do python -m one_jax.export \\
        --workdir=runs/mnist5k_$name --output=teachers/$name; done
Run: python -m one_jax.main --config=configs/mnist5k_resnet8_meal.py \\
    --config.method.teachers=teachers/resnet20,teachers/wrn10_1,teachers/densenet16_4 \\
    --workdir=runs/mnist5k_resnet8_meal
Variants: `:few` 50 training images of each class, 300 steps; `:plain` the network alone; `:smoke`
    four steps on generated images.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.mnist5k(options, 'meal')
