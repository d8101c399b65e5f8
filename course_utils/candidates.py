"""Files of a network and what is noted about each: the capstone's table. The steps are those of the
chapters before: export (11), calibration (06), distillation (04).

    table = Table(folder, images_per_order=24, seconds=0.7)
    table.enter("shipped", table.export(model, "shipped"))
    table.enter("INT8", table.quantized("shipped", "INT8"))
    table["INT8"].ms, table["INT8"].kb, table["INT8"].right
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from course_utils import data, measure, models, plots, training


@dataclass(frozen=True)
class Candidate:
    """A model file.

    >>> Candidate("INT8", Path("int8.onnx"), ms=1.5, kb=330.0, right=0.91)
    Candidate(name='INT8', ms=1.5, kb=330.0, right=0.91)
    """

    name: str
    path: Path = field(repr=False)
    ms: float  # one order of average size, one thread
    kb: float
    right: float  # share of the validation images


def cost(path: Path, seconds: float) -> tuple[float, float]:
    """(a, c): seconds of a call in ONNX Runtime with one thread, and of each image in it, from a
    line through the medians at 1, 8, 24 and 48 images; about `seconds` are spent on each.

    >>> a, c = cost(Path("model.onnx"), 0.5)  # doctest: +SKIP
    """
    session, sizes = measure.onnx_session(path, threads=1), (1, 8, 24, 48)
    x = np.random.default_rng(0).standard_normal((48, 1, 28, 28)).astype(np.float32)
    arms = [measure.onnx_arm(session, x[:n], f"{n}") for n in sizes]
    c, a = np.polyfit(sizes, [measure.latency(arm, seconds=seconds).p50 for arm in arms], 1)
    return max(float(a), 0.0), float(c)


def classes(path: Path, images: Tensor) -> np.ndarray:
    """What the file says about uint8 images (N, 1, 28, 28): its classes, int64 (N,).

    >>> classes(Path("model.onnx"), images)  # doctest: +SKIP
    array([9, 2, 1, 1])
    """
    session = measure.onnx_session(path)
    parts = (models.normalise(x).numpy() for x in images.split(500))
    return np.concatenate([session.run(None, {"image": x})[0].argmax(1) for x in parts])


def is_right(path: Path, part: str) -> np.ndarray:
    """Which images of "validation" or "test" the file names correctly: bool (N,).

    >>> is_right(Path("model.onnx"), "validation").mean()  # doctest: +SKIP
    0.92
    """
    images, labels = data.fashion_mnist(part)
    return classes(path, images) == labels.numpy()


def heal(
    student: nn.Module,
    teacher: nn.Module,
    *,
    epochs: int,
    limit: int | None = None,
    max_lr: float = 0.05,
    temperature: float = 4.0,
    seed: int = 0,
) -> nn.Module:
    """Train `student` in place on the teacher's soft labels of the training images (nine tenths of
    the loss; Hinton et al. 2015) and the true ones (a tenth); return it in eval mode. `limit` takes
    only so many images.

    >>> _ = heal(models.mini_resnet(8), models.mini_resnet(8), epochs=1, limit=256)
    """
    images, labels = (t[:limit] for t in data.fashion_mnist("train"))
    soft = F.log_softmax(training.predict(teacher, images) / temperature, 1)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(student.parameters(), max_lr, 0.9, weight_decay=5e-4, nesterov=True)
    steps = max(epochs * -(-len(images) // 128) + 1, 20)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, steps, pct_start=0.1)
    student.train().to(memory_format=torch.channels_last)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=order).split(128):
            logits = student(training.batch(images, index))
            own = F.log_softmax(logits / temperature, 1)
            kd = F.kl_div(own, soft[index], log_target=True, reduction="batchmean")
            loss = 0.9 * temperature**2 * kd + 0.1 * F.cross_entropy(logits, labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return student.eval()


class Table:
    """Candidates by name, in the order in which they were entered; their files lie in `folder`.

    >>> list(Table(Path("."), images_per_order=24, seconds=0.5))
    []
    """

    def __init__(self, folder: Path, *, images_per_order: float, seconds: float) -> None:
        self.folder, self.images_per_order, self.seconds = folder, images_per_order, seconds
        self._rows: dict[str, Candidate] = {}

    def __getitem__(self, name: str) -> Candidate:
        if name not in self._rows:
            raise KeyError(f"no candidate {name!r}; there are: {', '.join(self._rows) or 'none'}.")
        return self._rows[name]

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace(', ', '_').replace(' ', '_')}.onnx"

    def export(self, model: nn.Module, name: str) -> Path:
        """The model as one ONNX file whose batch size is free."""
        path = self._path(name)
        torch.onnx.export(
            model.to(memory_format=torch.contiguous_format).eval(),
            (torch.zeros(2, 1, 28, 28),),
            path,
            input_names=["image"],
            dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}},
            external_data=False,
            verbose=False,
        )
        return path

    def quantized(self, source: Path, name: str) -> Path:
        """A file with 8-bit weights and activations, one scale a channel, calibrated on 300
        training images.
        """
        from onnxruntime.quantization import QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        images = data.fashion_mnist("train")[0][:300]
        clean, target = self._path("clean"), self._path(name)
        quant_pre_process(source, clean)
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(clean, target, _Reader(images), per_channel=True, **kinds)
        return target

    def enter(self, name: str, path: Path) -> Candidate:
        """Measure a file and put it into the table."""
        a, c = cost(path, self.seconds / 3)
        ms, kb = 1e3 * (a + c * self.images_per_order), path.stat().st_size / 1e3
        right = float(is_right(path, "validation").mean())
        self._rows[name] = Candidate(name, path, ms, kb, right)
        return self._rows[name]

    def picture(self, fits: Callable[[Candidate], bool], floor: float) -> Figure:
        """Time against errors; a point's area is its file, a black edge says that it `fits`."""
        figure, ax = plots.axes(
            "one order, one thread (ms)",
            "wrong on the validation images (%)",
            height=4.2,
            title=f"{sum(map(fits, self))} of {len(self)} candidates keep to file and accuracy",
        )
        for i, x in enumerate(self):
            look = {"color": plots.COLOURS[i], "edgecolors": "black" if fits(x) else "none"}
            ax.scatter(x.ms, 100 * (1 - x.right), s=0.35 * x.kb, alpha=0.75, **look)
            ax.scatter([], [], color=plots.COLOURS[i], label=f"{x.name}: {x.kb:.0f} kB")
        ax.axhline(100 * (1 - floor), color="0.4", linestyle="--", label="errors that are allowed")
        ax.set_xlim(0, 1.1 * max(x.ms for x in self))
        plots.plain_log(ax.yaxis)
        ax.set_ylim(4, 120)
        figure.legend(
            *ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9
        )
        return figure


class _Reader:
    """What onnxruntime's calibration reads: a dict of inputs at a time, then None."""

    def __init__(self, images: Tensor) -> None:
        self.parts = iter(images.split(50))

    def get_next(self) -> dict[str, np.ndarray] | None:
        part = next(self.parts, None)
        return None if part is None else {"image": models.normalise(part).numpy()}
