"""Numbers for a model of time, from what the jobs measured."""

from collections.abc import Sequence

import numpy as np

__all__ = ["alpha_beta", "sent", "typical"]


def typical(life: Sequence[dict], case: str) -> dict[str, float]:
    """Seconds of a step by arm, from what `scaling` gave on each worker: of the slower worker, the
    median over rounds.

    >>> typical([{"1 x 4": {"ddp": [1.0, 2.0]}}, {"1 x 4": {"ddp": [3.0, 1.0]}}], "1 x 4")
    {'ddp': 2.5}
    """
    arms = life[0][case]
    return {arm: float(np.median(np.max([one[case][arm] for one in life], 0))) for arm in arms}


def sent(kind: str, life: Sequence[dict]) -> dict[int, float]:
    """Seconds of an all-reduce by bytes of the vector, from what `messages` gave on each worker.

    >>> sent("torch", [{"torch": {"16": [1.0]}}, {"torch": {"16": [2.0]}}])
    {16: 2.0}
    """
    times = [one[kind] for one in life]
    return {int(n): float(np.median(np.max([t[n] for t in times], 0))) for n in times[0]}


def alpha_beta(times: dict[int, float], p: int = 2) -> tuple[float, float]:
    """Seconds a message and seconds a byte of a ring of p workers, fitted to every other size by
    least squares of relative errors; neither is below 1 ps.

    >>> alpha, per_byte = alpha_beta({n: 2 * (1e-4 + n / 2 * 1e-9) for n in (8, 800, 8e6)})
    >>> round(alpha, 6), round(per_byte, 12)
    (0.0001, 1e-09)
    """
    sizes, took = np.array(list(times))[::2], np.array(list(times.values()))[::2]
    design = 2 * (p - 1) * np.stack([np.ones(len(sizes)), sizes / p], 1)
    fit, *_ = np.linalg.lstsq(design / took[:, None], np.ones(len(took)), rcond=None)
    return tuple(np.maximum(fit, 1e-12).tolist())
