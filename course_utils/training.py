"""The training recipe of chapter 02, for the chapters that need a trained network and teach
something else.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from course_utils import limits
from course_utils.models import normalise

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum under a one-cycle learning rate (Smith 2018), label smoothing and
    mirrored images.

    >>> Recipe(epochs=2).batch_size
    128
    """

    epochs: int = 4
    batch_size: int = 128
    max_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.25  # share of the steps in which the learning rate rises
    label_smoothing: float = 0.05
    flip: bool = True
    seed: int = 0


@dataclass
class History:
    """What a run cost and gave: one entry an epoch.

    >>> History(loss=[1.2, 0.7], seconds=3.1).loss[-1]
    0.7
    """

    loss: list[float] = field(default_factory=list)
    seconds: float = 0.0


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe | None = None,
    *,
    progress: bool = True,
) -> History:
    """Train `model` in place on uint8 images (N, 1, 28, 28) and int64 labels (N,); leaves it in
    eval mode.

    The order of images and the mirroring come from `recipe.seed` alone, so two models with one seed
    see the same batches: what differs between them is the models. Raises ValueError for data of
    other lengths or no data.

    >>> from course_utils import data, models
    >>> images, labels = data.fashion_mnist("validation")
    >>> net = models.mini_resnet(8, seed=0)
    >>> history = fit(net, images[:256], labels[:256], Recipe(epochs=2), progress=False)
    >>> len(history.loss), net.training
    (2, False)
    """
    recipe = recipe or Recipe()
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(
            f"{len(images)} images and {len(labels)} labels: both must have the same length, at"
            " least 1."
        )
    generator = torch.Generator().manual_seed(recipe.seed)
    steps_per_epoch = -(-len(images) // recipe.batch_size)
    optimizer = torch.optim.SGD(
        model.parameters(),
        recipe.max_lr,
        recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    total_steps = max(
        recipe.epochs * steps_per_epoch + 1, 8
    )  # OneCycle can't rise and fall in fewer
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.max_lr, total_steps=total_steps, pct_start=recipe.warmup
    )
    model.train().to(memory_format=torch.channels_last)
    history = History()
    start = time.perf_counter()
    with tqdm(
        total=recipe.epochs * steps_per_epoch,
        disable=not progress,
        leave=False,
        desc="training",
        mininterval=1,
    ) as bar:
        for _ in range(recipe.epochs):
            total = 0.0
            for index in torch.randperm(len(images), generator=generator).split(recipe.batch_size):
                x = batch(images, index, generator if recipe.flip else None)
                loss = F.cross_entropy(
                    model(x), labels[index], label_smoothing=recipe.label_smoothing
                )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(index)
                bar.update()
            history.loss.append(total / len(images))
    history.seconds = time.perf_counter() - start
    model.eval()
    return history


def batch(images: Tensor, index: Tensor, flip: torch.Generator | None = None) -> Tensor:
    """The images at `index`, normalised, channels last; with a generator, each is mirrored with
    probability one half.

    >>> images = torch.zeros(10, 1, 28, 28, dtype=torch.uint8)
    >>> batch(images, torch.tensor([0, 3, 5])).shape
    torch.Size([3, 1, 28, 28])
    """
    x = normalise(images[index])
    if flip is not None:
        mirrored = torch.rand(len(x), generator=flip) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return x.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """Logits (N, classes) of uint8 images (N, 1, 28, 28); the model's mode is left as it was, and
    eval is used.

    >>> from course_utils import models
    >>> predict(models.mini_resnet(8), torch.zeros(3, 1, 28, 28, dtype=torch.uint8)).shape
    torch.Size([3, 10])
    """
    was_training = model.training
    model.eval()
    parts = [
        model(normalise(part).contiguous(memory_format=torch.channels_last))
        for part in images.split(batch_size)
    ]
    model.train(was_training)
    return torch.cat(parts)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images classified right, between 0 and 1.

    >>> from course_utils import models
    >>> images = torch.zeros(4, 1, 28, 28, dtype=torch.uint8)
    >>> accuracy(models.mini_resnet(8), images, torch.tensor([3, 3, 3, 3])) in (0.0, 1.0)
    True
    """
    return float((predict(model, images).argmax(1) == labels).float().mean())


def side_by_side(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Results of the callables in `jobs`, in their order: each runs with one torch thread, as many
    at once as there are cores (eight at most). For networks so small that a second core hardly
    helps one run. Make networks before: a random generator is shared by all threads.

    The first error is raised when the others are through; the number of threads comes back.

    >>> side_by_side([lambda: 1, torch.get_num_threads])
    [1, 1]
    """
    threads, workers = torch.get_num_threads(), min(8, limits.usable_cores())
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda job: job(), jobs))
    finally:
        torch.set_num_threads(threads)
