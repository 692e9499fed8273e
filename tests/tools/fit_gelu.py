"""Prints the coefficients of kernels/cpu.py's GELU: P with erf(t / sqrt 2) = 1 - 2 / P(t) ** 16.

Least squares on P, weighted by what an error of P does to GELU, the weights raised where the error
is largest until it is nearly the same everywhere (Lawson's method).
usage: python tests/tools/fit_gelu.py
"""

import numpy as np
import torch

POWER, DEGREE, END, ROUNDS = 16, 6, 6.0, 600


def fit() -> tuple[float, np.ndarray]:
    """The largest error of GELU, and the coefficients from the highest power down."""
    t = np.linspace(0, END, 6001)
    tail = torch.special.erfc(torch.tensor(t / np.sqrt(2))).numpy() / 2
    root, want = tail ** (-1 / POWER), t * tail
    slope = POWER * t * root ** (-POWER - 1) + 1e-14
    powers, weight = np.vander(t, DEGREE + 1), np.ones_like(t)
    best = (np.inf, np.zeros(DEGREE + 1))
    for _ in range(ROUNDS):
        scale = slope * weight
        found, *_ = np.linalg.lstsq(powers * scale[:, None], root * scale, rcond=None)
        error = np.abs(t / (powers @ found) ** POWER - want)
        best = min(best, (float(error.max()), found), key=lambda pair: pair[0])
        weight = weight * (0.05 + error / error.max()) ** 0.3
        weight /= weight.max()
    return best


if __name__ == "__main__":
    worst, coefficients = fit()
    print(f"largest error {worst:.1e}")
    print(*map(float, coefficients), sep="\n")
