r"""
Your own operator
=================

Blur is one way to lose information. A small sensor, a mask, or a scanner are others. jfbfast takes any linear operator
:math:`A` for which you can write two functions: :math:`A x`, and :math:`A^\top y`, the *adjoint*. This tutorial writes
two of them, checks them, and trains a network for each:

- **downsampling**, a camera with half as many pixels along each axis, which needs nothing but the two functions;
- **missing pixels**, where a third piece of knowledge makes the layer faster.

To run it yourself: ``pip install 'jfbfast[train]'``.
"""

# %%
# Photographs
# -----------
#
# They are those of the first tutorial.

import matplotlib.pyplot as plt
import skimage.data
import torch
import torch.nn.functional as F
from torch import nn

import jfbfast
from jfbfast.operators.eigenbasis import DiagonalOperator

jfbfast.keep_freed_memory()
torch.manual_seed(0)


def photograph(image):
    """An array of bytes (H, W, 3) as a tensor (1, 3, H, W) on [−1, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1


training = [photograph(image) for image in (skimage.data.coffee(), skimage.data.cat(), skimage.data.rocket())]
unseen = photograph(skimage.data.astronaut())[..., 20:180, 140:300]


def batches(count, batch_size=8, side=48):
    """Random squares of the training photographs: `count` batches (batch_size, 3, side, side)."""
    for _ in range(count):
        batch = []
        for i in torch.randint(len(training), (batch_size,)):
            height, width = training[i].shape[-2:]
            top, left = int(torch.randint(height - side + 1, ())), int(torch.randint(width - side + 1, ()))
            batch.append(training[i][..., top : top + side, left : left + side])
        yield torch.cat(batch)


def noisy(image):
    return image + 0.01 * torch.randn_like(image)


def psnr(image):
    """The quality of a restoration of the unseen photograph, in dB."""
    return float(10 * torch.log10(4 / F.mse_loss(image, unseen)))


def show(images):
    _, axes = plt.subplots(1, len(images), figsize=(3 * len(images), 3.3), layout="constrained")
    for axis, (title, image) in zip(axes, images.items(), strict=True):
        axis.imshow(((image[0] + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title)
        axis.axis("off")
    plt.show()


# %%
# A x and its adjoint
# -------------------
#
# The operator is a module with ``forward``, which is :math:`A x`, and ``adjoint``. Here :math:`A` blurs a little, as a
# lens does, and takes means of 2 × 2 pixels. An operator may change the height and the width.
#
# The adjoint is the transposed matrix. It runs through the steps in the opposite order, and each step is transposed:
# the mean of four pixels becomes a quarter of the value for each of the four, and a blur has its own ``adjoint``.


class Downsampling(nn.Module):
    def __init__(self):
        super().__init__()
        self.blur = jfbfast.GaussianBlur(sigma=0.8, padding_mode="reflect")

    def forward(self, x):
        return F.avg_pool2d(self.blur(x), 2)

    def adjoint(self, y):
        return self.blur.adjoint(F.interpolate(y, scale_factor=2, mode="nearest") / 4)


# %%
# A wrong adjoint is the usual mistake, and nothing would raise an error: the solve would just end at another image.
# So check it. ``check_adjoint`` takes the shape of an :math:`x`, tries random images, and returns the largest relative
# error.

downsampling = Downsampling()
error = jfbfast.check_adjoint(downsampling, (2, 3, 32, 32))
print(f"largest relative error: {error:.1e}")
assert error < 1e-5

# %%
# If the quarter had been forgotten, it would say so:

try:
    jfbfast.check_adjoint(downsampling, (2, 3, 32, 32), adjoint=lambda y: 4 * downsampling.adjoint(y))
except ValueError as found:
    print(found)
else:
    raise AssertionError("the wrong adjoint was not found")

# %%
# If you cannot write the adjoint, PyTorch can compute it, because the adjoint of a linear function is its
# vector-Jacobian product. That costs one more application of :math:`A`.


class ByAutograd(Downsampling):
    def adjoint(self, y):
        x = y.new_zeros(*y.shape[:-2], 2 * y.shape[-2], 2 * y.shape[-1])
        return torch.autograd.functional.vjp(self, x, y, create_graph=True)[1]


assert jfbfast.check_adjoint(ByAutograd(), (2, 3, 32, 32)) < 1e-5

# %%
# Solve without a network
# -----------------------
#
# The preconditioned layer needs :math:`(A^\top A + \lambda I)^{-1}`. For an operator with nothing but the two
# functions, jfbfast solves this by conjugate gradients. ``IterativeOperator`` does that, and ``DEGrad`` puts an
# operator into one itself. Made by hand, it takes the accuracy, and solves :math:`\min_x \lVert A x - d \rVert^2 +
# \lambda \lVert x \rVert^2` (Tikhonov regularisation):

accurate = jfbfast.IterativeOperator(downsampling)
d = noisy(downsampling(unseen))
classical = max((accurate.solve(accurate.adjoint(d), damping) for damping in (0.001, 0.003, 0.01, 0.03)), key=psnr)

# %%
# Train with it
# -------------
#
# This is the loop of the first tutorial with another operator. As each application of the layer solves equations, a
# step takes longer than with a blur. ``tol=1e-2`` saves most of that time. The layer without a filter and an injection
# would have the same fixed points for every ``tol``. With both, as here, what the denoiser sees is wrong by at most 1%
# of the image's size.


def train(model, operators, steps):
    """Train by JFB; `operators(x)` gives the operator for a batch x."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for x in batches(steps):
        operator = operators(x)
        loss = F.mse_loss(model(noisy(operator(x)), operator), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def regularizer():
    return jfbfast.RED(jfbfast.UNet(3, features=(16, 32), blocks=(1, 1), injection=True), filter_damping="weight")


fast = jfbfast.IterativeOperator(downsampling, tol=1e-2)
model = jfbfast.DEGrad(fast, regularizer(), preconditioner="exact", solver=jfbfast.Anderson(tol=1e-2))
train(model, lambda x: fast, steps=120)

with torch.no_grad():
    restored = model(d)  # the operator of the model
bicubic = F.interpolate(d, scale_factor=2, mode="bicubic")
show(
    {
        "measured": d,
        f"bicubic, {psnr(bicubic):.1f} dB": bicubic,
        f"Tikhonov, {psnr(classical):.1f} dB": classical,
        f"trained, {psnr(restored):.1f} dB": restored,
        "sharp": unseen,
    }
)
assert psnr(restored) > psnr(classical) + 0.4 > psnr(bicubic) + 0.4

# %%
# An operator that is diagonal in a known basis
# ---------------------------------------------
#
# A photograph with missing pixels is the product with a mask of ones and zeros. Conjugate gradients could solve this,
# too, but :math:`(A^\top A + \lambda I)^{-1}` is just a division here, since :math:`A^\top A` is diagonal. Many
# operators are like this in some basis: :math:`A^\top A = V \mathrm{diag}(s) V^\top`. For circular blurs and for MRI
# it is Fourier's, for a mask the pixels themselves.
#
# ``DiagonalOperator`` is for them. It takes three functions: the ``eigenvalues`` :math:`s`, the ``coefficients``
# :math:`V^\top x` of an image, and the ``image`` :math:`V c` of coefficients. Then no application of the layer has to
# iterate, or to apply :math:`A` at all.


class Mask(DiagonalOperator, nn.Module):
    """Keep the pixels where the mask is 1; it may be another one for each image of a batch: (B, 1, H, W)."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return x * self.mask

    def adjoint(self, y):
        return y * self.mask

    def eigenvalues(self, like):
        return self.mask.square().to(like)

    def coefficients(self, x):
        return x

    def image(self, coefficients):
        return coefficients


def random_mask(x):
    """Keep half of the pixels, others for each image."""
    return Mask((torch.rand(len(x), 1, *x.shape[-2:]) < 0.5).float())


# %%
# The check is the same. The closed form has to agree with conjugate gradients, which know the two functions only:

mask = random_mask(unseen)
assert jfbfast.check_adjoint(mask, unseen) < 1e-5
closed, iterated = mask.solve(unseen, 0.1), jfbfast.IterativeOperator(mask).solve(unseen, 0.1)
assert torch.allclose(closed, iterated, atol=1e-4)

# %%
# In training, each batch has masks of its own. The operator of a call is the second argument of ``model(d, operator)``,
# and ``DEGrad(None, …)`` is a model that has none of its own.

model = jfbfast.DEGrad(None, regularizer(), preconditioner="exact", solver=jfbfast.Anderson(tol=1e-2))
train(model, random_mask, steps=300)

d = noisy(mask(unseen)) * mask.mask
with torch.no_grad():
    restored = model(d, mask)
show({f"measured, {psnr(d):.1f} dB": d, f"trained, {psnr(restored):.1f} dB": restored, "sharp": unseen})
assert psnr(restored) > psnr(d) + 10
assert model.solution.status.eq(jfbfast.Status.CONVERGED).all()

# %%
# Missing pixels behind a blur
# ----------------------------
#
# If the only new thing is that some values of a blurred image are missing, or noisier than others, you need no
# operator of your own. ``WeightedLeastSquares`` takes a weight for each value, 0 where there is none, and 1 over the
# variance of the noise elsewhere. What stands at a missing value does not matter, not even if it is NaN.
#
# The "denoiser" of this example is a little blur: without training it fills the gaps smoothly.

blur = jfbfast.GaussianBlur(sigma=1.0, padding_mode="reflect")
d = noisy(blur(unseen)).masked_fill(mask.mask == 0, torch.nan)
smooth = jfbfast.RED(jfbfast.GaussianBlur(sigma=0.7, padding_mode="reflect"), weight=0.02)
model = jfbfast.DEGrad(
    jfbfast.IterativeOperator(blur, tol=1e-3),
    smooth,
    preconditioner="exact",
    data_fidelity=jfbfast.data_fidelity.WeightedLeastSquares(mask.mask),
)
with torch.no_grad():
    filled = model(d)
show({"measured": d.nan_to_num(0), f"restored, {psnr(filled):.1f} dB": filled, "sharp": unseen})
assert psnr(filled) > psnr(blur(unseen))  # better than if no pixel had been missing, and none restored

# %%
# Where to go on
# --------------
#
# - `Using the library <https://jfbfast.github.io/jfbfast/latest/library.html>`_ has the operators that are there
#   already, and other noise, such as photon counts.
# - Tutorial 4 takes operators and denoisers from deepinv, which has MRI, tomography, inpainting and more.
# - `The method <https://jfbfast.github.io/jfbfast/latest/method.html>`_ explains what the preconditioner and the filter
#   are.
