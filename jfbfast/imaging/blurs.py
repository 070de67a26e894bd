"""The blur of a photograph, as a user gives it: by σ, by a point spread function, as motion or as defocus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from jfbfast.operators import point_spread
from jfbfast.operators.blur import GaussianBlur, SeparableBlur
from jfbfast.operators.convolution import Blur

AnyBlur = SeparableBlur | Blur  # A; both have the same methods

SOLVE_TOL = 1e-5  # of conjugate gradients; 1e-4 takes 10% less, and left errors of 90 grey levels in corners
AUTO = "auto"  # stands for a σ or a noise level that is to be estimated
KINDS = ("sigma", "psf", "motion", "defocus")
SIGMAS = "a number of pixels, two of them, down and across, or auto"  # what a σ that someone types takes


def numbers(name: str, text: str, counts: tuple[int, ...], takes: str) -> list[float]:
    """Read what someone has typed: numbers with commas between.

    Args:
        name: of the value, for the message.
        text: as typed.
        counts: how many numbers it may have.
        takes: what it takes, in words, for the message.

    Raises:
        ValueError: something else.

    Example:
        >>> from jfbfast.imaging.blurs import numbers
        >>> numbers("--motion", "9,30", (2,), "a length and an angle")
        [9.0, 30.0]
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in counts:
        raise ValueError(f"{name} is {text}; it takes {takes}")
    return values


@dataclass(frozen=True)
class BlurChoice:
    """A blur by exactly one of its first four attributes.

    Attributes:
        sigma: standard deviation of a Gaussian in pixels, or a (y, x) pair; "auto" if it is to be estimated.
        psf: a point spread function: a tensor (k_y, k_x), or a file that `point_spread.read` reads.
        motion: length in pixels and angle in degrees of a straight motion, counter-clockwise from the x axis.
        defocus: radius of a disc in pixels.
        kernel_size: side of the Gaussian's kernel, odd; None for 2⌈3σ⌉ + 1.

    Raises:
        ValueError: none or several of the four; a kernel size for another blur than a Gaussian. The attributes' values
            are checked by `operator`.

    Example:
        >>> from jfbfast.imaging.blurs import BlurChoice
        >>> str(BlurChoice(sigma=(1.0, 2.0))), str(BlurChoice(motion=(9, 30)))
        ('a Gaussian of σ = 1, 2 pixels', 'a motion of 9 pixels at 30°')
        >>> BlurChoice(sigma=1.5).operator("valid").kernel_size
        (11, 11)
    """

    sigma: float | Sequence[float] | str | None = None
    psf: Tensor | str | Path | None = None
    motion: Sequence[float] | None = None
    defocus: float | None = None
    kernel_size: int | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            told = " and ".join(given) or "nothing"
            raise ValueError(f"the blur is given by {told}; it takes one of {', '.join(KINDS)}")
        if self.kernel_size is not None and self.sigma is None:
            raise ValueError(f"kernel_size is {self.kernel_size}; it is for a Gaussian, given by sigma")
        if isinstance(self.sigma, str) and self.sigma != AUTO:
            raise ValueError(f"sigma is {self.sigma!r}; it takes one or two numbers of pixels, or 'auto'")
        if self.motion is not None and (not isinstance(self.motion, Sequence) or len(self.motion) != 2):
            raise ValueError(f"motion is {self.motion}; it takes a length in pixels and an angle in degrees")

    def with_sigma(self, sigma: float) -> BlurChoice:
        """The Gaussian with this σ and the same kernel size."""
        return replace(self, sigma=sigma)

    def operator(self, padding_mode: str = "valid") -> AnyBlur:
        """A, with this padding mode.

        Raises:
            ValueError: a value out of its range, a σ that is to be estimated, or a file that holds no point spread
                function.
        """
        if isinstance(self.sigma, str):
            raise ValueError("sigma is 'auto'; it takes numbers once it is estimated")
        if self.sigma is not None:
            return GaussianBlur(self.kernel_size, self.sigma, padding_mode)
        if self.motion is not None:
            psf = point_spread.motion(*self.motion)
        elif self.defocus is not None:
            psf = point_spread.defocus(self.defocus)
        else:
            assert self.psf is not None
            psf = self.psf if isinstance(self.psf, Tensor) else point_spread.read(self.psf)
        return Blur(psf, padding_mode, tol=SOLVE_TOL)

    def __str__(self) -> str:
        if isinstance(self.sigma, str):
            return "a Gaussian of unknown σ"
        if self.sigma is not None:
            sigmas = self.sigma if isinstance(self.sigma, Sequence) else (self.sigma,)
            return f"a Gaussian of σ = {', '.join(f'{each:g}' for each in sigmas)} pixels"
        if self.motion is not None:
            return f"a motion of {self.motion[0]:g} pixels at {self.motion[1]:g}°"
        if self.defocus is not None:
            return f"a defocus of radius {self.defocus:g}"
        return f"the point spread function {'given' if isinstance(self.psf, Tensor) else self.psf}"
