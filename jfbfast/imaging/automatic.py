"""The blur and the noise level to restore a photograph for, where they are to be estimated or not known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from jfbfast.imaging.blurs import AUTO, BlurChoice
from jfbfast.imaging.estimation import PATCH, Estimate, estimate

NOISE = 0.01  # on [−1, 1], of photographs that are too small to show theirs
UNSURE = 1.6  # an estimate is in doubt if the upper end of σ's range is so many times the lower end
_WIDTH = 2.56  # standard deviations of a normal distribution between its 10% and 90% quantiles


class Known(NamedTuple):
    """The blur and the noise level to restore for, and the estimate that they rest on, if there is one."""

    blur: BlurChoice
    noise: float
    found: Estimate | None


def _spread(found: Estimate) -> float:
    """The standard deviation of log σ."""
    low, high = found.sigma_range
    return max(math.log(high / low) / _WIDTH, 1e-3)


def combined(sigma: float, tolerance: float, found: Estimate) -> float:
    """The σ to restore for: the given one, or a smaller one if the photograph shows a smaller one.

    The mean of the two logarithms, weighted by the inverses of their variances; ``tolerance`` is the given σ's standard
    deviation, and the share by which the result exceeds the estimate's range at most. An estimate that is larger than
    the given σ changes nothing: the photograph may have been soft before it was blurred, and a σ that is too small does
    no harm.

    Example:
        >>> from jfbfast import Estimate
        >>> from jfbfast.imaging.automatic import combined
        >>> found = Estimate(1.0, 0.01, (0.9, 1.1), (0.009, 0.011))
        >>> round(combined(1.2, 0.2, found), 2), combined(0.8, 0.2, found)
        (1.02, 0.8)
    """
    if found.sigma >= sigma:
        return sigma
    given, seen = 1 / tolerance**2, 1 / _spread(found) ** 2
    mean = math.exp((given * math.log(sigma) + seen * math.log(found.sigma)) / (given + seen))
    return min(mean, (1 + tolerance) * found.sigma_range[1])


def known(
    name: str,
    d: Tensor,
    blur: BlurChoice,
    noise: float | str | None,
    tolerance: float,
    say: Callable[[str], object],
    warn: Callable[[str], object],
) -> Known:
    """Find the blur and the noise level to restore a photograph for.

    Args:
        name: of the photograph, for messages.
        d: the photograph, (C, H, W).
        blur: as given; its σ may be "auto".
        noise: as given, "auto" to estimate it, or None to estimate it if the photograph is large enough.
        tolerance: by which share the size of the blur may be wrong; 0 to keep the given σ.
        say, warn: called with a sentence on what was found, if σ was to be estimated, or if the photograph is clearly
            sharper than given.

    Raises:
        ValueError: a photograph that is too small, or has neither 1 nor 3 channels, and "auto".
    """
    given, level = blur.sigma, noise if isinstance(noise, (int, float)) else None
    checked = isinstance(given, (int, float)) and tolerance > 0
    if AUTO not in (given, noise):
        small = len(d) not in (1, 3) or min(d.shape[1:]) < PATCH
        if small or (level is not None and not checked):
            return Known(blur, NOISE if level is None else level, None)
    found = estimate(d)
    level = found.noise if level is None else level
    low, high = found.sigma_range
    seen = f"σ = {found.sigma:.2f} pixels ({low:.2f} to {high:.2f})"
    if given == AUTO:
        told = f"{name} shows a blur of {seen} and noise of {found.noise:.2g}"
        if high > UNSURE * low:
            warn(f"{told}. It does not show its blur well: compare the results for several σ.")
        else:
            say(f"{told}.")
        return Known(blur.with_sigma(round(found.sigma, 3)), level, found)
    if checked:
        assert isinstance(given, (int, float))
        sigma = round(combined(given, tolerance, found), 3)
        if sigma * (1 + tolerance) < given:
            warn(
                f"{name} is sharper than {blur} could leave it, since it shows {seen}. It is restored for σ = "
                f"{sigma:.2f}: check the blur."
            )
        blur = blur.with_sigma(sigma) if sigma < given else blur
    return Known(blur, level, found)
