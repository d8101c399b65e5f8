"""Profiles: the shapes that an engine is built for."""

import math
from collections.abc import Mapping, Sequence

from course_utils.trt.errors import OutsideProfile, ProfileError

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""For each input with a free dimension: the smallest shape, the one to tune for, the largest."""


def check_profiles(inputs: Mapping[str, Shape], profiles: Sequence[Profile]) -> None:
    """Raise ProfileError unless each profile fits the network's inputs, in which -1 is a free
    dimension.

    >>> check_profiles({"image": (-1, 3)}, [{"image": ((1, 3), (8, 3), (16, 3))}])
    >>> check_profiles({"image": (-1, 3)}, [{"image": ((1, 3), (8, 3), (4, 3))}])
    Traceback (most recent call last):
    course_utils.trt.errors.ProfileError: dimension 0 of image: smallest ≤ tuned ≤ largest ...
    """
    free = sorted(name for name, shape in inputs.items() if -1 in shape)
    if free and not profiles:
        raise ProfileError(
            f"the inputs {free} have free dimensions: give a profile with smallest, tuned and"
            " largest shape."
        )
    for profile in profiles:
        if missing := [n for n in free if n not in profile] + [
            n for n in profile if n not in inputs
        ]:
            raise ProfileError(f"a profile must name the inputs {free}; look at {missing}.")
        for name, (low, best, high) in profile.items():
            shape = inputs[name]
            if not len(low) == len(best) == len(high) == len(shape):
                raise ProfileError(
                    f"{name} has {len(shape)} dimensions; the profile says {low}, {best}, {high}."
                )
            for i, (size, a, b, c) in enumerate(zip(shape, low, best, high, strict=True)):
                if not 0 <= a <= b <= c or (size != -1 and not a == b == c == size):
                    wanted = "smallest ≤ tuned ≤ largest" if size == -1 else f"{size} three times"
                    raise ProfileError(
                        f"dimension {i} of {name}: {wanted} is due; the profile says {a}, {b}, {c}."
                    )


def choose_profile(bounds: Sequence[Profile], shapes: Mapping[str, Shape]) -> int:
    """The profile that covers `shapes` and was tuned nearest to them (in elements); OutsideProfile
    if none covers them.

    >>> small, large = {"x": ((1,), (4,), (8,))}, {"x": ((1,), (32,), (64,))}
    >>> choose_profile([small, large], {"x": (6,)}), choose_profile([small, large], {"x": (30,)})
    (0, 1)
    """
    fitting = {}
    for index, profile in enumerate(bounds):
        sides = [(shapes[n], low, high) for n, (low, _, high) in profile.items()]
        if all(
            len(s) == len(a) and all(x <= y <= z for x, y, z in zip(a, s, b, strict=True))
            for s, a, b in sides
        ):
            fitting[index] = sum(
                abs(math.prod(shapes[n]) - math.prod(best)) for n, (_, best, _) in profile.items()
            )
    if not fitting:
        ranges = "; ".join(", ".join(f"{n} from {p[n][0]} to {p[n][2]}" for n in p) for p in bounds)
        raise OutsideProfile(
            f"{dict(shapes)} lies outside every profile ({ranges}). Build the engine with a wider"
            " one."
        )
    return min(fitting, key=fitting.get)
