"""The embedded data: Fashion-MNIST and a text of Jane Austen, every file checked by its SHA-256
before use.
"""

import gzip
import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from course_utils import ROOT

if TYPE_CHECKING:
    import torch

DATASETS = ROOT / "datasets"
FULL = DATASETS / "full"
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SPLITS = ("train", "validation", "test")
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
_IDX = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""SHA-256 of the four *uncompressed* files of the official data set."""


class DataError(RuntimeError):
    """A data file is missing or is not the one the course was made with."""


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits.

    >>> path = Path("empty")
    >>> path.touch()
    >>> sha256(path)[:8]
    'e3b0c442'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verified(path: Path, expected: str, remedy: str) -> Path:
    """`path` itself, if its SHA-256 is `expected`; DataError with both digests and the remedy
    otherwise.

    >>> verified(Path("nowhere.txt"), "e3b0c442", "Get it with: course data --full")
    Traceback (most recent call last):
    course_utils.data.DataError: nowhere.txt is missing from /. Get it with: course data --full
    """
    if not path.is_file():
        raise DataError(f"{path.name} is missing from {path.parent.name}/. {remedy}")
    found = sha256(path)
    if found != expected:
        raise DataError(
            f"{path.name} is not the file the course was made with: SHA-256 is {found}, not"
            f" {expected}. {remedy}"
        )
    return path


def dataset_file(name: str) -> Path:
    """A file of datasets/, checked against datasets/SHA256.json.

    >>> dataset_file("persuasion.txt").suffix
    '.txt'
    """
    digests = json.loads((DATASETS / "SHA256.json").read_text())
    if name not in digests:
        raise DataError(f"datasets/ has no file {name!r}; it has: {', '.join(sorted(digests))}.")
    return verified(
        DATASETS / name, digests[name], f"Restore it with: git checkout -- datasets/{name}"
    )


def fashion_mnist(
    split: str = "train", *, full: bool = False
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Images as uint8 (N, 1, 28, 28) and labels as int64 (N,), ten classes in equal shares.

    `split` is "train", "validation" or "test". Embedded: 12,000, 3,000 and 10,000 images. With
    `full=True`, after `course data --full`: 55,000, 5,000 and 10,000. The 3,000 are among the
    5,000, the 12,000 among the 55,000, and train and validation share no image. Raises DataError
    for a missing or altered file, ValueError for another split.

    >>> images, labels = fashion_mnist("validation")
    >>> images.shape, images.dtype, CLASSES[labels[0]] in CLASSES
    (torch.Size([3000, 1, 28, 28]), torch.uint8, True)
    """
    import torch

    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}.")
    if full:
        images, labels = full_arrays(split)
    else:
        with np.load(dataset_file(f"fashion_mnist_{split}.npz"), allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


def austen() -> str:
    """The text of *Persuasion* (1818), public domain: about 83,000 words.

    >>> austen()[:10]
    'Persuasion'
    """
    return dataset_file("persuasion.txt").read_text(encoding="utf-8")


def full_arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The full data set's `split`: images uint8 (N, 28, 28), labels uint8 (N,).

    >>> images, labels = full_arrays("validation")  # doctest: +SKIP
    >>> images.shape, labels.shape  # doctest: +SKIP
    ((5000, 28, 28), (5000,))
    """
    stem = "t10k" if split == "test" else "train"
    images = _read_idx(f"{stem}-images-idx3-ubyte", (-1, 28, 28), offset=16)
    labels = _read_idx(f"{stem}-labels-idx1-ubyte", (-1,), offset=8)
    if split == "test":
        return images, labels
    is_validation = validation_mask(labels)
    keep = is_validation if split == "validation" else ~is_validation
    return images[keep], labels[keep]


def validation_mask(labels: np.ndarray) -> np.ndarray:
    """Which of the 60,000 official training images are validation: 500 of each class, drawn once by
    a fixed seed.

    >>> labels = np.repeat(np.arange(10), 6000)
    >>> int(validation_mask(labels).sum())
    5000
    """
    rng = np.random.default_rng(20260101)
    mask = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        mask[rng.choice(np.flatnonzero(labels == digit), 500, replace=False)] = True
    return mask


def _read_idx(name: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
    path = verified(FULL / name, _IDX[name], "Get it with: course data --full")
    return np.frombuffer(path.read_bytes(), np.uint8, offset=offset).reshape(shape).copy()


def fetch_full() -> list[str]:
    """Put the four official files into datasets/full/, from Debian's package if installed, else
    through torchvision.

    Files already there and whole are kept. Each arrives under another name and is renamed once its
    digest is right, so an interruption leaves no half a file. Returns the names of the files that
    were added.

    >>> fetch_full()  # doctest: +SKIP
    ['train-images-idx3-ubyte', 'train-labels-idx1-ubyte', …]
    """
    FULL.mkdir(parents=True, exist_ok=True)
    missing = [n for n in _IDX if not ((FULL / n).is_file() and sha256(FULL / n) == _IDX[n])]
    for name in missing:
        packed = _DEBIAN / f"{name}.gz"
        if not packed.is_file():
            packed = _download(name)
        part = FULL / f"{name}.part"
        try:
            with gzip.open(packed, "rb") as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
            verified(
                part,
                _IDX[name],
                f"It was unpacked from {packed.name}: remove that and run the command again.",
            )
            part.replace(FULL / name)
        except (OSError, EOFError) as error:
            raise DataError(
                f"{packed.name} could not be unpacked ({error}). Remove it and run the command"
                " again."
            ) from error
        finally:
            part.unlink(missing_ok=True)
    return missing


def _download(name: str) -> Path:
    """torchvision's own mirrors and checksums; the compressed file stays in
    datasets/full/download/.
    """
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import download_url

    resource = next((r for r in FashionMNIST.resources if r[0].startswith(name)), None)
    folder = FULL / "download"
    last: Exception | None = None
    for mirror in FashionMNIST.mirrors:
        try:
            download_url(mirror + resource[0], str(folder), filename=resource[0], md5=resource[1])
            return folder / resource[0]
        except (OSError, RuntimeError) as error:
            last = error
    raise DataError(
        f"{name} could not be fetched ({last}). Without a network, install Debian's package"
        " dataset-fashion-mnist and run the command again."
    )
