r"""
Restore your photographs
========================

``jfbfast restore`` and ``jfbfast.restore`` undo the blur of a photograph, when you know the blur, or let it be
estimated. This tutorial restores a photograph, does it wrongly on purpose, and tells how to see what is wrong and what
to do about it. The network, ``universal``, ships with jfbfast, so nothing has to be trained.

To run it yourself: ``pip install 'jfbfast[train]'``; restoring alone takes ``pip install jfbfast``.
"""

# %%
# A photograph, and what a camera makes of it
# -------------------------------------------
#
# To see how good a restoration is, one has to know the sharp scene. So this is a simulated camera. It blurs light, as
# a lens does, encodes it for the eye (sRGB), adds noise, and rounds to 8 bits.

import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import skimage.data
import torch

import jfbfast
from jfbfast.imaging.light import to_encoded, to_linear
from jfbfast.imaging.photographs import Photograph, read_photograph, write_photograph

scene = torch.from_numpy(skimage.data.astronaut()[:272, 90:362]).permute(2, 0, 1) / 127.5 - 1  # (3, 272, 272)


def camera(blur, noise=0.01):
    """The photograph of the scene through this blur: (3, h, w) on [−1, 1], without the margin that is not known."""
    image = to_encoded(blur(to_linear(scene)[None]))[0]
    image = image + noise * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return ((image.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def psnr(image, blur):
    """The quality of an image in dB, by comparison with the scene."""
    y, x = blur.margin
    truth = scene[:, y : scene.shape[1] - y, x : scene.shape[2] - x]
    return float(10 * torch.log10(4 / (image - truth).square().mean()))


def show(images, columns=4, part=slice(60, 220)):
    """Pictures side by side, with their titles: the same part of each, so that its pixels can be seen."""
    rows = -(-len(images) // columns)
    _, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3.3 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, image) in zip(axes.flat, images.items(), strict=False):
        axis.imshow(((image[:, 20:180, part] + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy())
        axis.set_title(title)
    plt.show()


out_of_focus = jfbfast.GaussianBlur(sigma=1.5, padding_mode="valid")
photo = camera(out_of_focus)

# %%
# A known blur
# ------------
#
# The blur is a Gaussian with a standard deviation of 1.5 pixels. ``restore`` returns the image and a report. The noise
# is estimated from the photograph, unless you give it.

restored = jfbfast.restore(photo, sigma=1.5)
print(f"{restored.report.method}; {restored.report.blur}; noise {restored.report.noise:.4f}")
print(f"{restored.report.evaluations:.0f} applications of the layer, {restored.report.unconverged} without convergence")

show(
    {
        f"photograph, {psnr(photo, out_of_focus):.1f} dB": photo,
        f"restored, {psnr(restored.image, out_of_focus):.1f} dB": restored.image,
        "scene": scene[:, out_of_focus.margin[0] :, out_of_focus.margin[1] :],
    },
    columns=3,
)
assert psnr(restored.image, out_of_focus) > psnr(photo, out_of_focus) + 5

# %%
# The command line does the same with a file. The file keeps its depth, colour profile and EXIF.
#
# .. code-block:: bash
#
#    jfbfast restore photo.png --sigma 1.5                   # writes photo-restored.png
#    jfbfast restore photo.png --sigma 1.5 --compare         # and a picture of before and after
#    jfbfast restore holiday/ --sigma 1.5 --out restored/    # every photograph in a directory
#
# Here it runs on a file that is written for it. What it prints are warnings and errors only, because of ``--quiet``.

with tempfile.TemporaryDirectory() as directory:
    source, target = Path(directory, "photo.png"), Path(directory, "sharp.png")
    write_photograph(source, Photograph((photo + 1) / 2, None, np.dtype("uint8")))
    command = [sys.executable, "-m", "jfbfast", "restore", source, "--sigma", "1.5", "--out", target, "--quiet"]
    subprocess.run(command, check=True)
    of_command = 2 * read_photograph(target).pixels - 1

difference = float((of_command - restored.image.clamp(-1, 1)).abs().max())
print(f"largest difference between the command and the function: {difference:.4f}; rounding to 8 bits: {1 / 255:.4f}")
assert difference < 1 / 255 + 1e-3

# %%
# An unknown blur
# ---------------
#
# ``sigma="auto"`` (``--sigma auto``) estimates the Gaussian blur that the photograph shows. ``jfbfast.estimate`` tells
# how sure that is: its ranges are meant to hold in 80% of cases. A narrow range can be trusted. If it is wide,
# ``restore`` warns, and you should compare several values by eye: ``--sigma 1 --sigma 1.5 --sigma 2`` writes a picture
# of all three.

found = jfbfast.estimate(photo)
print(f"σ = {found.sigma:.2f} pixels, from {found.sigma_range[0]:.2f} to {found.sigma_range[1]:.2f}; true: 1.5")
print(f"noise = {found.noise:.4f}, from {found.noise_range[0]:.4f} to {found.noise_range[1]:.4f}; true: 0.0103")
automatic = jfbfast.restore(photo, sigma="auto")
assert abs(psnr(automatic.image, out_of_focus) - psnr(restored.image, out_of_focus)) < 0.3

# %%
# The true noise is 0.0103 because rounding to 8 bits adds 0.0023 to the camera's 0.01, as squares add up.
#
# Three mistakes
# --------------
#
# **The wrong light.** A lens blurs light, but most programs calculate with the values that the file has. By default,
# ``restore`` takes the blur for one of light. For a photograph that software has blurred or enlarged, say
# ``light="encoded"`` (``--light encoded``). Here that is the wrong choice, and more than half of the gain is lost.
#
# **A Gaussian blur that is too large.** It sharpens what was never blurred: rings and grain. One that is too small
# does no such harm, and restores less. So if you are not sure, take the smaller one. ``tolerance=0`` tells ``restore``
# to believe the given blur; it is here to show what happens then.
#
# **Too much noise.** Then the restoration is softer than it could be.

attempts = {
    "σ = 1.5": {"sigma": 1.5},
    "the wrong light": {"sigma": 1.5, "light": "encoded"},
    "σ = 2, tolerance 0": {"sigma": 2.0, "tolerance": 0},
    "σ = 1.2, tolerance 0": {"sigma": 1.2, "tolerance": 0},
    "noise = 0.05": {"sigma": 1.5, "noise": 0.05},
}
pictures, quality = {}, {}
for name, options in attempts.items():
    image = jfbfast.restore(photo, **options).image
    quality[name] = psnr(image, out_of_focus)
    pictures[f"{name}: {quality[name]:.1f} dB"] = image
show(pictures, columns=5)

assert quality["σ = 1.5"] == max(quality.values())
assert quality["σ = 2, tolerance 0"] < psnr(photo, out_of_focus)  # worse than doing nothing
assert quality["σ = 1.2, tolerance 0"] > psnr(photo, out_of_focus)
gains = {name: value - psnr(photo, out_of_focus) for name, value in quality.items()}
assert gains["the wrong light"] < gains["σ = 1.5"] / 2

# %%
# What ``restore`` does about it
# ------------------------------
#
# With the tolerance of 0.2, which is the default, ``restore`` expects that the size of the blur may be wrong by 20%. It
# estimates σ too, and if the photograph is sharper than the given σ could leave it, takes a smaller one. It says so in
# a warning if the difference is large. Warnings are sentences that say what was seen and what was done:

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    corrected = jfbfast.restore(photo, sigma=2.0)
    told_too_little_noise = jfbfast.restore(photo, sigma=1.5, noise=0.001)
for warning in caught:
    print("-", warning.message)

print(f"σ = 2 with the default tolerance: {psnr(corrected.image, out_of_focus):.1f} dB")
assert psnr(corrected.image, out_of_focus) > quality["σ = 2, tolerance 0"] + 10
assert told_too_little_noise.report.contradicted

# %%
# The second warning is about a photograph that has more noise than it was told. It is restored for the noise that it
# shows.
#
# Blurs that are not Gaussian
# ---------------------------
#
# ``motion=(9, 30)`` (``--motion 9,30``) is a straight motion of 9 pixels at 30°, ``defocus=3`` a disc with a radius of
# 3 pixels, and ``psf=`` any image of a point, a tensor or a file. None of these is estimated, so ``restore`` cannot
# warn if their size is wrong. The report helps: ``report.residual`` is the part of the photograph that the restored
# image does not explain. If that is larger than ``report.noise``, the noise that the photograph was restored for, then
# the blur is wrong. Blurs that are much too small may explain it, too, so take the longest one that does:

shaken = jfbfast.Blur(jfbfast.point_spread.motion(length=9, angle=30), padding_mode="valid")
photo = camera(shaken)

trials = {length: jfbfast.restore(photo, motion=(length, 30)) for length in (5, 7, 9, 11)}
for length, (image, report) in trials.items():
    verdict = "explained" if report.residual < report.noise else "not explained"
    print(f"{length:2} pixels: residual {report.residual:.3f}, noise {report.noise:.3f}: {verdict}; ", end="")
    print(f"{psnr(image, shaken):.1f} dB")
show(
    {f"photograph, {psnr(photo, shaken):.1f} dB": photo}
    | {f"motion of {length}: {psnr(image, shaken):.1f} dB": image for length, (image, _) in trials.items()},
    columns=5,
)

chosen = max(length for length, (_, report) in trials.items() if report.residual < report.noise)
assert chosen == 9
assert psnr(trials[9].image, shaken) > psnr(photo, shaken) + 5

# %%
# Where there is little noise, plug-and-play is better for such blurs, in one and a half times the time:
# ``checkpoint="plug-and-play"`` (``--checkpoint plug-and-play``). A clone has this network. The wheels of a release do
# not: there it is fetched once, which takes ``pip install 'jfbfast[hub]'``.
#
# What to do about rings, grain and softness
# ------------------------------------------
#
# - **Rings along all edges**: a smaller blur, so a smaller ``--sigma`` or another length of ``--motion``.
# - **Grain in smooth parts**: a smaller blur, or a larger ``--noise``.
# - **As soft as before**: a larger blur, the other ``--light``, or a smaller ``--noise``. The photograph may also be
#   sharp already.
# - **A warning of the noise**: the noise that the warning names, or a smaller blur.
# - **A residual above the noise**: another kind of blur, or another size.
#
# Where to go on
# --------------
#
# - `Restoring photographs <https://jfbfast.github.io/jfbfast/latest/restoring.html>`_ has all options, what was
#   measured for each kind of mistake, and a gallery.
# - `Estimating <https://jfbfast.github.io/jfbfast/latest/estimating.html>`_ tells how well the blur and the noise are
#   found.
# - The next tutorial replaces the blur by an operator of your own.
