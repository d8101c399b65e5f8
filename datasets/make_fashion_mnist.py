"""Make the three embedded Fashion-MNIST files from the full data set: `course data --full`, then
run this file.
"""

from pathlib import Path

import numpy as np

from course_utils import data

HERE = Path(__file__).resolve().parent
SIZES = {"train": 12_000, "validation": 3_000, "test": 10_000}


def main() -> None:
    for split, size in SIZES.items():
        images, labels = data.full_arrays(split)
        rng = np.random.default_rng(20260102)
        picks = [
            rng.choice(np.flatnonzero(labels == c), size // 10, replace=False) for c in range(10)
        ]
        # Test keeps the official order, so that a row number means the same image everywhere.
        order = (
            np.arange(len(labels)) if split == "test" else rng.permutation(np.concatenate(picks))
        )
        np.savez_compressed(
            HERE / f"fashion_mnist_{split}.npz", images=images[order], labels=labels[order]
        )
        print(split, images[order].shape, np.bincount(labels[order]))


if __name__ == "__main__":
    main()
