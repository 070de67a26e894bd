r"""
Your own denoiser, and deepinv
==============================

The network inside of the layer need not be one of jfbfast. This tutorial trains with a denoiser that is written here,
says what jfbfast checks and does with it, and then takes operators, denoisers and the trainer of the library
`deepinv <https://deepinv.github.io>`_.

To run it yourself: ``pip install 'jfbfast[train]'``, and ``pip install deepinv``.
"""

# %%
# Photographs
# -----------
#
# They are those of the first tutorial, but with values in [0, 1], as deepinv has them. Nothing in jfbfast depends on
# the range, except for the networks that were trained for one.

import deepinv
import matplotlib.pyplot as plt
import skimage.data
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import jfbfast

jfbfast.keep_freed_memory()
torch.manual_seed(0)


def photograph(image):
    """An array of bytes (H, W, 3) as a tensor (1, 3, H, W) on [0, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1)[None] / 255


def squares(image, side=48):
    """The image (1, 3, H, W) in squares: (B, 3, side, side)."""
    return image.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, side, side)


training = torch.cat([squares(photograph(image)) for image in (skimage.data.coffee(), skimage.data.cat())])
unseen = photograph(skimage.data.astronaut())[..., 20:180, 140:300]


def noisy(image):
    return image + 0.005 * torch.randn_like(image)


def psnr(image):
    """The quality of a restoration of the unseen photograph, in dB."""
    return float(10 * torch.log10(1 / F.mse_loss(image, unseen)))


def show(images):
    _, axes = plt.subplots(1, len(images), figsize=(3 * len(images), 3.3), layout="constrained")
    for axis, (title, image) in zip(axes, images.items(), strict=True):
        axis.imshow(image[0].clamp(0, 1).permute(1, 2, 0).numpy())
        axis.set_title(title)
        axis.axis("off")
    plt.show()


# %%
# A denoiser is any map of images to images
# -----------------------------------------
#
# This one is four convolutions that predict what to take away from the image. It knows nothing of jfbfast.
#
# PyTorch's ``spectral_norm`` divides each weight by its largest singular value, as a matrix. A map whose parts do not
# enlarge differences much makes a layer that converges faster. In a solve the layer has to be one fixed map, so jfbfast
# holds it still: in training a spectral norm takes one power iteration for each ``model(d)`` and none within it, a
# batch norm uses its running statistics, and dropout is off. You need not change your network for this.


class Denoiser(nn.Module):
    def __init__(self, features=24):
        super().__init__()
        self.layers = nn.Sequential(
            spectral_norm(nn.Conv2d(3, features, 3, padding=1)),
            nn.ReLU(),
            spectral_norm(nn.Conv2d(features, features, 3, padding=1)),
            nn.ReLU(),
            spectral_norm(nn.Conv2d(features, features, 3, padding=1)),
            nn.ReLU(),
            spectral_norm(nn.Conv2d(features, 3, 3, padding=1)),
        )

    def forward(self, x):
        return x - self.layers(x)


# %%
# ``RED`` makes the layer's :math:`R(x) = \lambda (x - D(W x))` of a denoiser :math:`D`, where :math:`W` removes what
# the blur has destroyed. That is all that changes in the training loop:

blur = jfbfast.GaussianBlur(kernel_size=9, sigma=1.5, padding_mode="reflect")
model = jfbfast.DEGrad(blur, jfbfast.RED(Denoiser(), filter_damping="weight"), preconditioner="exact")
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in range(150):
    x = training[torch.randint(len(training), (8,))]
    loss = F.mse_loss(model(noisy(blur(x))), x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

d = noisy(blur(unseen))
with torch.no_grad():
    restored = model(d)
show({f"blurred, {psnr(d):.1f} dB": d, f"restored, {psnr(restored):.1f} dB": restored, "sharp": unseen})
assert psnr(restored) > psnr(d) + 1.5

# %%
# How strongly the layer contracts tells how fast its solve converges, and how close JFB's gradient is to the exact one:
# below 1 the plain iteration converges, and at 0.5 each application halves the error.

part, start = d[..., :48, :48], model.solution.value[..., :48, :48]
with torch.no_grad():
    model(part, x0=start)
contraction = float(jfbfast.spectrum.contraction_factor(model.layer, model.solution.value, (part,), steps=30)[0])
print(f"contraction factor {contraction:.2f}, {int(model.solution.iterations[0])} applications of the layer")
assert contraction < 0.9

# %%
# What jfbfast checks
# -------------------
#
# A denoiser has to keep the shape of the image. Wrong ones are refused with a sentence:

wrong = jfbfast.DEGrad(blur, jfbfast.RED(nn.Conv2d(3, 3, 3)), preconditioner="exact")  # without padding
try:
    wrong(d)
except ValueError as error:
    print(error)
else:
    raise AssertionError("a denoiser that shrinks images was not refused")

# %%
# After each solve, the last application of the layer is compared with what the solve claimed. A network that treats
# the images of a batch together, or changes from call to call, is found by this: ``model(d)`` warns with
# a ``ConvergenceWarning``, and ``model.solution.status`` tells for which images.
#
# What is not checked is whether your network denoises. ``RED(denoiser)`` takes the denoised image; a network that
# predicts the noise is an :math:`R`, and goes into ``DEGrad(blur, network)`` directly, which is the paper's layer.
#
# Networks of your own, or of timm, torchvision or any other library work in the same way. Save with
# ``model.save_pretrained(DIR)``, and pass the network again when you load: ``DEGrad.from_pretrained(DIR,
# denoiser=Denoiser())``.
#
# Denoisers of deepinv
# --------------------
#
# Denoisers of deepinv are told the noise level: D(x, σ). ``RED(denoiser, noise=σ)`` calls them so, and with
# ``learn_noise=True`` σ is trained, too. The model below has untrained weights, because this page downloads nothing;
# ``pretrained="download"`` is deepinv's way to get trained ones.

denoiser = deepinv.models.DnCNN(in_channels=3, out_channels=3, depth=4, nf=16, pretrained=None)
model = jfbfast.DEGrad(blur, jfbfast.RED(denoiser, noise=0.05, filter_damping="weight"), preconditioner="exact")
model(noisy(blur(training[:2]))).square().mean().backward()
assert all(parameter.grad is not None for parameter in denoiser.parameters())

# %%
# Operators of deepinv, and its trainer
# -------------------------------------
#
# Each linear physics of deepinv is an operator: blur, inpainting, MRI, tomography, single-pixel cameras. If it has a
# closed form of :math:`(A^\top A + \lambda I)^{-1}`, jfbfast uses it and checks each solution; otherwise conjugate
# gradients do. ``check_adjoint`` takes a physics as well.
#
# Every model of jfbfast is a reconstructor of deepinv, ``model(y, physics)``, so ``deepinv.Trainer`` and deepinv's
# losses take it as it is. Here each image of a batch has a motion blur of its own. ``DEGrad(None, …)`` is a model that
# has no operator: every call brings one.

noise_model = deepinv.physics.GaussianNoise(0.005)
physics = deepinv.physics.BlurFFT((3, 48, 48), torch.ones(1, 1, 1, 1), noise_model=noise_model)
motions = deepinv.physics.generator.MotionBlurGenerator((9, 9))
assert jfbfast.check_adjoint(physics, (2, 3, 48, 48)) < 1e-5

network = jfbfast.UNet(3, features=(16, 32), blocks=(1, 1), injection=True)
model = jfbfast.DEGrad(None, jfbfast.RED(network, filter_damping="weight"), preconditioner="exact")
deepinv.Trainer(
    model,
    physics,
    torch.optim.Adam(model.parameters(), lr=3e-3),
    torch.utils.data.DataLoader([{"x": x} for x in training], batch_size=8, shuffle=True),
    epochs=6,
    physics_generator=motions,
    online_measurements=True,
    device="cpu",
    non_blocking_transfers=False,
    save_path=None,
    show_progress_bar=False,
    verbose=False,
).train()

# %%
# The test is on the photograph that was not trained on, blurred by a motion that was not either. The image may have
# another size, as long as the physics is for it. For comparison, deepinv restores by Tikhonov regularisation.

motion = motions.step(1, seed=1)["filter"]
physics = deepinv.physics.BlurFFT(tuple(unseen.shape[1:]), motion, noise_model=noise_model)
y = physics(unseen)
with torch.no_grad():
    restored = model(y, physics)
classical = max((physics.prox_l2(torch.zeros_like(y), y, 1 / damping) for damping in (1e-3, 1e-2, 3e-2)), key=psnr)
show(
    {
        f"moved, {psnr(y):.1f} dB": y,
        f"Tikhonov, {psnr(classical):.1f} dB": classical,
        f"restored, {psnr(restored):.1f} dB": restored,
        "sharp": unseen,
    }
)
assert psnr(restored) > psnr(classical) + 0.3 > psnr(y) + 0.3

# %%
# Where to go on
# --------------
#
# - `Using jfbfast with deepinv <https://jfbfast.github.io/jfbfast/latest/deepinv.html>`_: which losses and operators
#   work, what does not, and training without sharp images.
# - ``examples/any_network.py`` turns a layer that has nothing to do with images into an implicit network.
# - The next tutorial measures whether a model is sound.
