r"""
Ten lines to train
==================

This tutorial trains a network that undoes blur, on three photographs, in under half a minute of one CPU core. You need
to know what a training loop in PyTorch looks like, and nothing about implicit networks.

**The task.** A measurement is :math:`d = A x + \varepsilon`: a sharp image :math:`x` was blurred by a known blur
:math:`A`, and noise :math:`\varepsilon` was added. The network gets :math:`d` and has to find :math:`x`.

**The network.** It repeats one layer until the image no longer changes. The layer draws the image towards the
measurement, and towards what a small trained network takes for an image. Where this ends is called the *fixed point*,
and it is the network's output.

To run it yourself: ``pip install 'jfbfast[train]'``.
"""

# %%
# Photographs
# -----------
#
# scikit-image brings some photographs along. Three are for training, and a fourth one, which the network never sees in
# training, is for the test. Images are tensors (batch, channels, height, width) with values in [−1, 1].

import tempfile

import matplotlib.pyplot as plt
import skimage.data
import torch
import torch.nn.functional as F

import jfbfast

jfbfast.keep_freed_memory()  # Linux: spares the system from clearing the same memory again in each step
torch.manual_seed(0)


def photograph(image):
    """An array of bytes (H, W, 3) as a tensor (1, 3, H, W) on [−1, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1


training = [photograph(image) for image in (skimage.data.coffee(), skimage.data.cat(), skimage.data.rocket())]
unseen = photograph(skimage.data.astronaut())[..., :256, 100:356]


def batches(count, batch_size=8, side=48):
    """Random squares of the training photographs: `count` batches (batch_size, 3, side, side)."""
    for _ in range(count):
        batch = []
        for i in torch.randint(len(training), (batch_size,)):
            height, width = training[i].shape[-2:]
            top, left = int(torch.randint(height - side + 1, ())), int(torch.randint(width - side + 1, ()))
            batch.append(training[i][..., top : top + side, left : left + side])
        yield torch.cat(batch)


# %%
# The ten lines
# -------------
#
# Four lines make the blur, the model and the optimizer:
#
# - ``GaussianBlur`` is :math:`A`.
# - ``UNet`` is the small network inside of the layer. With ``injection=True`` it also sees what a classical method,
#   Tikhonov regularisation, makes of the measurement.
# - ``RED`` turns it into the part of the layer that pulls the image towards a plausible one. With
#   ``filter_damping="weight"`` the network sees only those parts of the image that the blur has left something of.
# - ``DEGrad`` is the whole model. ``preconditioner="exact"`` makes the repetitions few.
#
# Six lines are the training loop, as you know it from PyTorch.

blur = jfbfast.GaussianBlur(kernel_size=9, sigma=1.5, padding_mode="reflect")
regularizer = jfbfast.RED(jfbfast.UNet(3, features=(16, 32), blocks=(1, 1), injection=True), filter_damping="weight")
model = jfbfast.DEGrad(blur, regularizer, preconditioner="exact")
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

before, after = [], []  # for the curves below
for x in batches(500):
    d = blur(x) + 0.01 * torch.randn_like(x)
    loss = F.mse_loss(model(d), x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

    before.append(float(F.mse_loss(d, x)))
    after.append(float(loss.detach()))

# %%
# What happened in ``model(d)``: the layer was applied, without gradients, until another application would have changed
# the image by less than a thousandth of its size. Then it was applied once more, and ``loss.backward()``
# differentiated that one application only. This is
# *Jacobian-free backpropagation* (JFB). So however often the layer was applied, a step takes the memory of one
# application.
#
# ``model.solution`` tells of each image of the last batch how often the layer was applied, and how it ended:
# ``Status.CONVERGED`` is 0.

print("applications of the layer:", model.solution.iterations.tolist())
print("status:", model.solution.status.tolist())
assert model.solution.status.eq(jfbfast.Status.CONVERGED).all()

# %%
# The loss
# --------
#
# The batches differ a lot, because a square of sky is easier to restore than one of fur. So the figure has the mean
# squared error of each batch divided by that of the blurred batch: at 1 nothing is gained, and below 1 the restored
# images are closer to the sharp ones than the blurred images were.


def running_mean(values, length=25):
    return torch.tensor(values).unfold(0, length, 1).mean(1).numpy()


ratio = [a / b for a, b in zip(after, before, strict=True)]
fig, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
axis.plot(ratio, color="tab:blue", alpha=0.25, label="each batch")
axis.plot(range(24, len(ratio)), running_mean(ratio), color="tab:blue", label="mean of 25 batches")
axis.axhline(1, color="grey", linewidth=0.8)
axis.set(xlabel="step", ylabel="error, restored / blurred", yscale="log")
axis.set_yticks([0.5, 1, 2], ["0.5", "1", "2"])
axis.minorticks_off()
axis.legend()
plt.show()

print(f"error of the last 25 batches, restored / blurred: {running_mean(ratio)[-1]:.2f}")
assert running_mean(ratio)[-1] < 0.7

# %%
# Before and after
# ----------------
#
# The test is on the fourth photograph. Its quality is the PSNR in decibels: 3 dB more stand for half of the squared
# error. For comparison there is Tikhonov regularisation, which has no network, with the setting that is best for
# this very photograph.


def psnr(image, truth=unseen):
    """Peak signal-to-noise ratio in dB; white and black are 2 apart."""
    return float(10 * torch.log10(4 / F.mse_loss(image, truth)))


d = blur(unseen) + 0.01 * torch.randn_like(unseen)
with torch.no_grad():
    restored = model(d)
classical = max((jfbfast.tikhonov(blur, d, damping) for damping in torch.logspace(-4, -1, 20).tolist()), key=psnr)

shown = {"blurred": d, "Tikhonov": classical, "restored": restored, "sharp": unseen}
fig, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
for axis, (name, image) in zip(axes, shown.items(), strict=True):
    axis.imshow(((image[0, :, 20:180, 40:200] + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy())
    axis.set_title(name if image is unseen else f"{name}, {psnr(image):.1f} dB")
    axis.axis("off")
plt.show()

assert psnr(restored) > psnr(d) + 2.5
assert psnr(restored) > psnr(classical) + 0.5

# %%
# Keep the model
# --------------
#
# ``save_pretrained`` writes a directory with the weights and a description of the model, and ``from_pretrained`` makes
# the same model from it. ``trained_noise`` tells the commands which noise the model was trained for.

model.trained_noise = 0.01
with tempfile.TemporaryDirectory() as directory:
    model.save_pretrained(directory)
    loaded = jfbfast.DEGrad.from_pretrained(directory)

with torch.no_grad():
    assert F.mse_loss(loaded(d), restored) < 1e-6

# %%
# Where to go on
# --------------
#
# - Half a minute is little. ``python examples/train.py 2000``, in a clone of the repository, trains a larger network,
#   and ``jfbfast train PHOTOGRAPHS --out DIR`` trains on a directory of photographs, with validation, checkpoints and
#   resuming: `Training <https://jfbfast.github.io/jfbfast/latest/training.html>`_.
# - The next tutorial restores photographs from files, with a network that ships with jfbfast.
# - Tutorial 3 puts another operator in the place of the blur, tutorial 4 another network in the place of ``UNet``, and
#   tutorial 5 tells how to see whether a model is sound.
