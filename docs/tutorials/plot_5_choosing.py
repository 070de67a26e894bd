r"""
Choosing a form
===============

jfbfast has several forms of the layer, and it measures whether a trained one is sound. This tutorial trains six forms
for the same time, compares them, and goes through the figures of a report: what each means, and what to do about it.

The short answer is the **filtered form with injection**, which the first tutorial uses. After the same time of training
it is about as good as the others, its solve takes half of the evaluations or fewer, and its layer contracts. The end of
the page tells when to take another.

To run it yourself: ``pip install 'jfbfast[train]'``.
"""

# %%
# The problem
# -----------
#
# Grey photographs, a Gaussian blur, and noise of 0.02, in small squares, so that everything takes seconds.

import warnings

import matplotlib.pyplot as plt
import skimage.data
import torch
import torch.nn.functional as F

import jfbfast
from jfbfast.diagnostics import convergence_history, report

jfbfast.keep_freed_memory()
torch.manual_seed(0)


def squares(image, side=32):
    """An array of bytes (H, W) or (H, W, 3) as grey squares on [−1, 1]: (B, 1, side, side)."""
    values = torch.from_numpy(image).float() / 127.5 - 1
    values = values.mean(2) if values.dim() == 3 else values
    return values.unfold(0, side, side).unfold(1, side, side).reshape(-1, 1, side, side)


training = torch.cat([squares(skimage.data.coffee()), squares(skimage.data.cat())])
unseen = squares(skimage.data.camera()[60:220, 140:300])[6:10]
blur = jfbfast.GaussianBlur(sigma=1.6, padding_mode="reflect")


def noisy(image):
    return image + 0.02 * torch.randn_like(image)


def psnr(image):
    return float(10 * torch.log10(4 / F.mse_loss(image, unseen)))


d = noisy(blur(unseen))

# %%
# Six forms
# ---------
#
# All have the same small U-Net as denoiser :math:`D`, a network that returns a cleaner image.
#
# - *Paper's*: gradient descent, :math:`T(x) = x - \eta (A^\top (A x - d) + R(x))` with
#   :math:`R(x) = \lambda (x - D(x))`.
# - *Preconditioned*: the same with a step size for each frequency.
# - *Filtered*: also, :math:`D` sees only the parts of the image that the blur has left something of.
# - *Filtered with injection*: :math:`D` also sees Tikhonov's restoration, which is the same at every evaluation.
# - *DE-PROX* and *DE-ADMM*: two other algorithms, with :math:`D` in the place of a proximal operator.


def unet(injection=False):
    network = jfbfast.UNet(1, features=(16, 32), blocks=(1, 1), injection=injection)
    if not injection:
        network.load_state_dict(denoiser.state_dict())
    return network


forms = {
    "paper's": lambda: jfbfast.DEGrad(blur, jfbfast.RED(unet())),
    "preconditioned": lambda: jfbfast.DEGrad(blur, jfbfast.RED(unet()), preconditioner="exact"),
    "filtered": lambda: jfbfast.DEGrad(blur, jfbfast.RED(unet(), filter_damping="weight"), preconditioner="exact"),
    "with injection": lambda: jfbfast.DEGrad(
        blur, jfbfast.RED(unet(injection=True), filter_damping="weight"), preconditioner="exact"
    ),
    "DE-PROX": lambda: jfbfast.DEProx(blur, unet(), preconditioner="exact"),
    "DE-ADMM": lambda: jfbfast.DEADMM(blur, unet()),
}

# %%
# First the denoiser alone learns to remove noise, which takes no solve. The forms without injection need this: with
# random weights, their layer does not contract, and no solve converges. ``jfbfast train`` does it by itself.

denoiser = jfbfast.UNet(1, features=(16, 32), blocks=(1, 1))
optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
for _ in range(200):
    x = training[torch.randint(len(training), (16,))]
    level = torch.empty(len(x), 1, 1, 1).uniform_(0.02, 0.12)
    loss = F.mse_loss(denoiser(x + level * torch.randn_like(x)), x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %%
# Then each form trains by JFB. A training step takes the evaluations of its solve, and as much as about four more for
# the gradient. So each form may spend 800 of them, and one that solves in few evaluations makes more steps. ``report``
# measures each trained model on two of the squares.


def train(model, budget, penalty=0.0):
    """Train until the budget is spent; return the number of steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    steps = spent = 0
    while spent < budget:
        x = training[torch.randint(len(training), (8,))]
        measured = noisy(blur(x))
        loss = F.mse_loss(model(measured), x)
        if penalty:
            loss = loss + penalty * jfbfast.jacobian_penalty(model, measured, bound=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps, spent = steps + 1, spent + int(model.solution.iterations.max()) + 4
    return steps


models, reports, quality = {}, {}, {"blurred": psnr(d)}
print(f"{'':16}    PSNR  evaluations  training steps     γ  cosine of JFB")
print(f"{'blurred':16} {psnr(d):4.1f} dB")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", jfbfast.ConvergenceWarning)  # common in the first steps
    for name, make in forms.items():
        torch.manual_seed(0)
        models[name] = model = make()
        model.solver = jfbfast.Anderson(tol=1e-3, max_iter=12)
        steps = train(model, budget=800)
        with torch.no_grad():
            quality[name] = psnr(model(d))
        evaluations = float(model.solution.iterations.float().mean())
        reports[name] = measured = report(model, d[:2], unseen[:2], iterations=100)
        print(f"{name:16} {quality[name]:4.1f} dB {evaluations:12.1f} {steps:15d}", end="")
        print(f" {float(measured.contraction_factor.max()):5.2f} {float(measured.cosine['jfb'].min()):14.3f}")

assert min(quality[name] for name in forms) > quality["blurred"] + 1  # each form restores
assert max(quality[name] for name in forms) - quality["with injection"] < 0.7
evaluations = {name: float(measured.solution.iterations.float().mean()) for name, measured in reports.items()}
slower = [name for name in forms if name not in ("filtered", "with injection")]
assert all(evaluations["with injection"] <= evaluations[name] / 2 for name in slower)

# %%
# What happens if the solve goes on
# ---------------------------------
#
# A model is applied until the residual is below the tolerance. ``convergence_history`` goes on from there, and shows
# two things: whether the residual falls, and whether the image stays as good. The paper's form is best after a dozen
# evaluations here and gets worse later, so that its quality depends on when you stop. The filtered forms are at their
# fixed point after seven evaluations, and stay there.

fig, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
for name, model in models.items():
    history = convergence_history(model, d, unseen, iterations=60)
    axes[0].semilogy(range(1, 61), history.residual.mean(1).numpy(), label=name)
    axes[1].plot(range(1, 61), history.psnr.mean(1).numpy(), label=name)
axes[0].set(xlabel="evaluations", ylabel="residual")
axes[0].axhline(1e-3, color="grey", linewidth=0.8)
axes[1].set(xlabel="evaluations", ylabel="mean PSNR, dB")
axes[1].legend()
plt.show()

# %%
# The report
# ----------
#
# This is the whole report of the form with injection. ``report.plot("report.png")`` draws it, and
# ``jfbfast diagnose MODEL PHOTO …`` does both for a model that ships or that you have trained.

print(reports["with injection"])

assert reports["with injection"].contraction_factor.max() < 0.9
assert reports["with injection"].cosine["jfb"].min() > 0.9

# %%
# And this is the report of the paper's form, which is not sound after so little training: it hardly contracts, and
# JFB's gradient does not point where the exact one does. (`The paper's own layer
# <https://jfbfast.github.io/jfbfast/latest/training.html>`_ tells how it is trained well.)

print(reports["paper's"])
assert reports["paper's"].contraction_factor.max() > 0.95 and reports["paper's"].cosine["jfb"].min() < 0.5

# %%
# What to do about each figure
# ----------------------------
#
# **Contraction factor γ.** The largest size of an eigenvalue of :math:`\partial T / \partial x` at the fixed point.
# Near it, the plain iteration gains a factor γ with each evaluation: at 0.3 two evaluations make one digit, and at 0.9
# it takes 22. Above 1 the plain iteration leaves the fixed point; Anderson's method often converges still. *If it is
# above 0.9:* take the filtered form, or train with ``jacobian_penalty``, as below.
#
# **Operator norm.** Below 1 every step brings all images closer together. Above 1 a step may lead away at first, and γ
# decides.
#
# **Bound on γ.** Only the filtered form has one: :math:`\lambda / (\sqrt\lambda + \sqrt\delta)^2` times the Lipschitz
# constant of :math:`D`, which is measured at these images. Below 1 it proves that γ is. *If you need this for every
# image:* a ``NonexpansiveDenoiser`` has a Lipschitz constant of at most 1, by construction, at a price in quality.
#
# **Lowest and highest Re μ.** The real parts of these eigenvalues. A lowest one below −1 makes the iteration swing out.
# *Then* ``averaging="auto"`` takes shorter steps with the same fixed points. A highest one near 1 makes it creep, and
# averaging cannot help; the penalty can.
#
# **κ(MᵀM) and 1/γ.** JFB's theorem needs the first to be below the second. It is far above it in all six models, and
# this is no fault: the theorem says nothing then, and the cosine tells directly whether the gradient descends.
#
# **Evaluations.** What a solve takes to the model's own tolerance. *If they reach ``max_iter``:* first look at γ. Only
# if that is sound, raise ``max_iter``.
#
# **Residual at 100.** With no tolerance the solve should settle far below the tolerance. *If it stays near it*, ask
# for no smaller tolerance; *if it stays above*, the layer does not contract.
#
# **PSNR at 10, 30, 100.** *If it falls*, the best image is not the fixed point. The filtered form ends that, and until
# then a larger ``tol`` stops earlier.
#
# **Cosine of each gradient.** The angle between that gradient and the exact one. Above 0.9 they point nearly the same
# way, and the exact one costs a second solve. *If JFB's is below 0.5:* make the layer contract, or train with
# ``gradient="neumann"``, and last ``gradient="implicit"``.
#
# The penalty
# -----------
#
# ``jacobian_penalty`` trains a layer to contract: it adds to the loss by how much :math:`\partial T / \partial x`
# exceeds a bound. Here it goes on training the preconditioned form.

model = models["preconditioned"]
before = float(reports["preconditioned"].contraction_factor.max())
with warnings.catch_warnings():
    warnings.simplefilter("ignore", jfbfast.ConvergenceWarning)
    train(model, budget=500, penalty=0.1)
    measured = report(model, d[:2], unseen[:2], iterations=100)
after = float(measured.contraction_factor.max())
with torch.no_grad():
    restored = model(d)
print(f"γ {before:.2f} before, {after:.2f} after; PSNR {quality['preconditioned']:.1f} and {psnr(restored):.1f} dB")
assert after < before

# %%
# Which to take
# -------------
#
# - **No photographs to train on**: ``restore`` with the network ``universal``, or with ``checkpoint="plug-and-play"``,
#   which is better where there is little noise and takes half as long again.
# - **One known blur**: the filtered form with injection. A network that is applied once, without a fixed point, is as
#   good for one blur, and trains faster: ``jfbfast train --form feed-forward``.
# - **Many Gaussian blurs and noise levels**: ``jfbfast train --form universal``.
# - **An operator of your own**: the filtered form; tutorials 3 and 4.
# - **Photon counts**: ``DEGrad(blur, regularizer, data_fidelity=Poisson(gain, background))``, without a preconditioner.
# - **A proof that it converges**: the filtered form with a ``NonexpansiveDenoiser``.
# - **The paper's results**: ``DEGrad(blur, DnCNN())``, trained as ``docs/training/paper.yaml`` says.
#
# The settings, in this order:
#
# - **Tolerance**: 1e-3 for training, which is the default. For restoring, 1e-2 changes nothing that you can see.
# - **Solver**: ``Anderson()``, the default. ``Broyden()``, ``Inertial()`` and ``Picard()`` are there to compare.
# - **Gradient**: ``"jfb"``, the default; another one if the report says so.
# - **Number format**: float32 on a CPU; tutorial 6 has those of a GPU.
# - **Denoiser**: a ``UNet`` on a CPU, since it works at half of the resolution and below.
#
# Where to go on
# --------------
#
# - `The method <https://jfbfast.github.io/jfbfast/latest/method.html>`_ explains the forms, why the filtered one
#   converges, and has a comparison of all six after longer training.
# - `Where the fixed point pays <https://jfbfast.github.io/jfbfast/latest/fixed_point.html>`_ compares it with networks
#   that are applied once, and with unrolled ones.
# - `Performance <https://jfbfast.github.io/jfbfast/latest/performance.html>`_ has what each choice costs.
