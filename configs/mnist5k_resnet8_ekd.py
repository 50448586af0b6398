"""ResNet-8 on 5,000 MNIST digits with EKD as reconstructed.

Source: Asif, Tang, Harrer, "Ensemble Knowledge Distillation for Learning Improved and Efficient
    Networks", ECAI 2020. As reconstructed: the abstract fixes a branched, compact student, teachers
    of different kinds for different branches, and the ensemble deployed; the form of the loss and
    its constants are ours. Trained by the recipe of the demo.
Recipe: 12 epochs of SGD, Nesterov momentum 0.9, batch 100, rate 0.1 to 0 by a cosine, weight decay
    5e-4; pad 2 and crop, no flip; three branches above one shared stage, each taught by one frozen
    teacher, and their mean by the mean of the teachers; T = 10, weights 0.5 of the cross-entropies,
    0.6 of the distillation, 1 of the squared error in it. 223,854 parameters deployed (223,854 in
    training).
Expect: docs/methods.md has the table of `make methods`, made with `:few`, the machine and the
    seeds.
Teachers: three networks of different kinds, trained on all images:
    python -m one_jax.main --config=configs/mnist5k_resnet8.py:plain --config.model.name=resnet20 \\
        --workdir=runs/mnist5k_resnet20
    python -m one_jax.main --config=configs/mnist5k_resnet8.py:plain --config.model.name=wrn10_1 \\
        --workdir=runs/mnist5k_wrn10_1
    python -m one_jax.main --config=configs/mnist5k_resnet8.py:plain \\
        --config.model.name=densenet16_4 --workdir=runs/mnist5k_densenet16_4
    for name in resnet20 wrn10_1 densenet16_4; do python -m one_jax.export \\
        --workdir=runs/mnist5k_$name --output=teachers/$name; done
Run: python -m one_jax.main --config=configs/mnist5k_resnet8_ekd.py \\
    --config.method.teachers=teachers/resnet20,teachers/wrn10_1,teachers/densenet16_4 \\
    --workdir=runs/mnist5k_resnet8_ekd
Variants: `:few` 50 training images of each class, 300 steps (`:few` with
    --config.data.examples_per_class=100 --config.train.epochs=30: 100 images, as many steps);
    `:plain` the network alone; `:smoke` four steps on generated images;
    --config.method.pairing=all_to_all or ensemble_to_all.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.mnist5k(options, 'ekd')
