"""Wrong answers to chapter 00's exercise, by somebody who has read only its text."""

from answers import wrong


@wrong("00.A", "read only: whole division, so 3 to 2 becomes 1")
def whole_division(old_seconds, new_seconds):
    return float(old_seconds // new_seconds)


@wrong("00.A", "read only: the gain instead of the factor, 12 to 4 is then 2")
def gain(old_seconds, new_seconds):
    return (old_seconds - new_seconds) / new_seconds


@wrong("00.A", "read only: never below 1, a slow-down is hidden")
def never_below_one(old_seconds, new_seconds):
    return max(1.0, old_seconds / new_seconds)


@wrong("00.A", "read only: a slow-down as a negative factor")
def negative_factor(old_seconds, new_seconds):
    if old_seconds >= new_seconds:
        return old_seconds / new_seconds
    return -new_seconds / old_seconds


@wrong("00.A", "read only: larger over smaller, the direction is lost")
def larger_over_smaller(old_seconds, new_seconds):
    return max(old_seconds, new_seconds) / min(old_seconds, new_seconds)


@wrong("00.A", "read only: rounded to one digit, 1.04 becomes 1.0")
def one_digit(old_seconds, new_seconds):
    return round(old_seconds / new_seconds, 1)


@wrong("00.A", "read only: upside down")
def upside_down(old_seconds, new_seconds):
    return new_seconds / old_seconds


@wrong("00.A", "read only: a guard of a millisecond in the denominator, microseconds go wrong")
def guard(old_seconds, new_seconds):
    return old_seconds / max(new_seconds, 1e-3)


@wrong("00.A", "read only: the old time is always the 12 of the example")
def twelve(old_seconds, new_seconds):
    return 12.0 / new_seconds
