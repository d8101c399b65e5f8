"""Answers to the exercise of chapter 00."""

import math
from fractions import Fraction

import numpy as np
import torch

from answers import right, wrong

right("00.A", "fractions")(lambda old, new: Fraction(old) / Fraction(new))
right("00.A", "NumPy's 32 bits")(lambda old, new: np.float32(old) / np.float32(new))
right("00.A", "a tensor of 64 bits")(lambda old, new: torch.tensor(old, dtype=torch.float64) / new)
right("00.A", "a tensor's number")(lambda old, new: (torch.tensor(old) / torch.tensor(new)).item())
right("00.A", "logarithms")(lambda old, new: math.exp(math.log(old) - math.log(new)))
right("00.A", "calls a second")(lambda old, new: np.array([1 / new]) / np.array([1 / old]))

wrong("00.A", "new over old")(lambda old, new: new / old)
wrong("00.A", "the share of time saved")(lambda old, new: (old - new) / old)
wrong("00.A", "how much more is done: one too few")(lambda old, new: (old - new) / new)
wrong("00.A", "per cent")(lambda old, new: 100 * old / new)
wrong("00.A", "never below 1")(lambda old, new: max(old, new) / min(old, new))
wrong("00.A", "whole numbers")(lambda old, new: old // new)
wrong("00.A", "one decimal")(lambda old, new: round(old / new, 1))
wrong("00.A", "three decimals")(lambda old, new: round(old / new, 3))
wrong("00.A", "a doubling counts 1")(lambda old, new: math.log2(old / new))
wrong("00.A", "a text")(lambda old, new: f"{old / new:.2f}x")
wrong("00.A", "seconds saved")(lambda old, new: old - new)
wrong("00.A", "a small number against division by zero")(lambda old, new: old / (new + 1e-3))
wrong("00.A", "not a number")(lambda old, new: float("nan"))
wrong("00.A", "a function of two")(lambda old, new: lambda: old / new)
