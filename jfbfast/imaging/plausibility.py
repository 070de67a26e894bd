"""Check from a photograph's power spectrum whether the blur and noise given for it are plausible."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jfbfast import checks
from jfbfast.imaging.blurs import AnyBlur
from jfbfast.operators.frame import cut

BLOCK = 128  # pixels
CONTRADICTION = 1.4  # times the noise, the file's included; a photograph that shows more contradicts its noise level
LEAST_NOISE = 1e-4  # stands for a given noise level of 0
MOST_CLIPPED = 0.01  # share of a block's values
TOLERANCE = 0.2  # by which share σ, or the size of another blur, may be wrong
FILE_ERROR = 0.005  # on [−1, 1]: about what JPEG of quality 90 adds; rounding to 8 bits adds 0.0023


def gain(blur: AnyBlur, height: int, width: int) -> Tensor:
    """|â|² of a blur at the frequencies of `torch.fft.fft2`, (height, width), from its image of a point."""
    y, x = blur.kernel_size
    point = torch.zeros(1, 1, 2 * y - 1, 2 * x - 1, dtype=torch.float64)
    point[..., y - 1, x - 1] = 1
    image = blur(point)[0, 0]
    if blur.margin == (0, 0):
        image = cut(image, (y // 2, x // 2))
    wrapped = torch.zeros(height, width, dtype=torch.float64)
    places = torch.meshgrid(torch.arange(y) % height, torch.arange(x) % width, indexing="ij")
    wrapped.index_put_(places, image, accumulate=True)
    return torch.fft.fft2(wrapped).abs().square()


class PowerSpectrum:
    """The power of a blurred photograph at each frequency, and what the blur leaves of the scene there.

    The power is the mean over half-overlapping blocks under a Hann window (Welch, 1967). The windows are nearly zero
    at the photograph's borders, where a blur mixes in unknown surroundings, so the spectrum describes the interior.
    White noise of standard deviation ν has the power ν² at every frequency.

    The power of the sharp scene is assumed to fall as 1/|ω|², as in natural scenes (Field, "Relations between the
    statistics of natural images and the response properties of cortical cells", 1987). It is fitted to the photograph
    at the low frequencies, which the blur lets through.

    Args:
        blur: A.
        d: the photograph, (C, H, W) in [−1, 1].
        clipped: which values of d may be clipped, (C, H, W); None for none. Clipping makes edges that the blur could
            not have left, so blocks with more than 1% of such values do not count, unless all have.

    Attributes:
        power: of d, the mean over channels and blocks, (h, w) for blocks of h × w pixels.
        gain: |â|², of the blur, (h, w).
        scene: the expected power of the sharp scene, (h, w); not finite where it is unknown.
    """

    def __init__(self, blur: AnyBlur, d: Tensor, clipped: Tensor | None = None) -> None:
        block = max(BLOCK, 8 * max(blur.kernel_size))
        height, width = (min(block, side) for side in d.shape[-2:])
        # Hann windows without their zeros
        down, across = (torch.hann_window(n + 2, periodic=False)[1:-1] for n in (height, width))
        window = down[:, None] * across
        totals, counts = (
            torch.zeros(2, height, width, dtype=torch.float64),
            [0, 0],
        )  # of all blocks, and of clipped ones
        for top in range(0, d.shape[-2] - height + 1, max(1, height // 2)):
            blocks = d[:, top : top + height].float().unfold(-1, width, max(1, width // 2)).movedim(-2, 0)
            blocks = (blocks - blocks.mean((-2, -1), keepdim=True)) * window
            power = torch.fft.fft2(blocks).abs().square().double()
            totals[0] += power.sum((0, 1))
            counts[0] += power.shape[0] * power.shape[1]
            if clipped is not None:
                rows = clipped[:, top : top + height].unfold(-1, width, max(1, width // 2)).movedim(-2, 0)
                affected = rows.float().mean((-2, -1)) > MOST_CLIPPED
                totals[1] += power[affected].sum(0)
                counts[1] += int(affected.sum())
        if counts[1] < counts[0]:
            totals[0], counts[0] = totals[0] - totals[1], counts[0] - counts[1]
        self.power = totals[0] / (counts[0] * window.square().sum())
        self.gain = gain(blur, height, width)
        down, across = (2 * math.pi * torch.fft.fftfreq(n, dtype=self.power.dtype) for n in self.power.shape)
        squared = down[:, None].square() + across.square()  # |ω|²
        low = (self.gain > 0.5) & (squared > 0) & (squared < (math.pi / 4) ** 2)
        self.scene = (self.power * squared / self.gain)[low].mean() / squared

    def noise(self, given: float) -> float:
        """Measure the noise level ν at the frequencies where the blur leaves the scene less power than the given noise.

        0 if there is no such frequency, as after a mild blur.
        """
        quiet = self.gain * self.scene < given**2
        return float(self.power[quiet].mean().sqrt()) if quiet.any() else 0.0

    def plausible_noise(self, given: float) -> tuple[float, bool]:
        """Find the noise level, the given one or higher, at which the photograph is plausible.

        The photograph contradicts a level if it shows far more noise than that. It is then noisier than given, or
        sharper than the blur could have left it, since it shows the scene itself at these frequencies.

        Returns:
            The noise level, and whether the photograph contradicts the given one.
        """
        start = level = max(given, LEAST_NOISE)
        while (seen := self.noise(level)) > CONTRADICTION * math.hypot(level, FILE_ERROR):
            level = seen
        return max(given, seen), level > start

    def mismatch(self, error: float) -> float:
        """The part of d, as a noise level, that a slightly wrong blur would leave unexplained.

        If the σ of a Gaussian is wrong by the share ε, the error, then |â| = exp(−|ω|²σ²/2) is wrong by
        ε|ω|²σ²|â| = ε|log |â|²||â|. The same expression stands for an error in the size of other blurs.
        """
        gain = self.gain.clamp_min(1e-12)
        power = (error * gain.log()).square() * gain * self.scene
        return float(power[self.scene.isfinite()].sum() / power.numel()) ** 0.5

    def damping(self, noise: float) -> float:
        """Find the λ at which Tikhonov's residual A x − d is as strong as the noise (Morozov's discrepancy principle).

        By bisection on log λ between 1e-8 and 1e2; the residual λ/(|â|² + λ) d̂ grows with λ.

        Args:
            noise: ν > 0, the noise's standard deviation in d's units.

        Raises:
            ValueError: ``noise`` is not a positive number.
        """
        checks.positive("noise", noise)
        low, high = math.log(1e-8), math.log(1e2)
        for _ in range(40):
            middle = (low + high) / 2
            damping = math.exp(middle)
            residual = (damping / (self.gain + damping)).square() * self.power
            low, high = (middle, high) if float(residual.mean()) < noise**2 else (low, middle)
        return math.exp(low)
