"""An implicit network as a reconstructor of deepinv: the operator of each call, deepinv's losses, trainer and test."""

import copy
import pickle

import deepinv
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.utils.data import DataLoader

import jfbfast
from jfbfast import RED, Anderson, Blur, DEGrad, GaussianBlur, IterativeOperator, UNet, UniversalDEGrad

physics, losses = deepinv.physics, deepinv.loss
SIZE = 16


def contraction():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1))


def kernels(batch):
    taps = torch.rand(batch, 1, 3, 3)
    return taps / taps.sum((2, 3), keepdim=True)


def blurs(batch):
    return physics.BlurFFT((1, SIZE, SIZE), filter=kernels(batch))


def small_model(blur=None, **options):
    denoiser = UNet(channels=1, features=(4, 8), blocks=(1, 1), injection=True)
    return DEGrad(blur, RED(denoiser, filter_damping="weight"), preconditioner="exact", **options)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("gradient", ["jfb", "implicit", "phantom"])
@pytest.mark.parametrize("kind", ["BlurFFT", "Blur", "ours"])
def test_the_operator_of_a_call_takes_the_place_of_the_models_own(kind, gradient):
    taps = kernels(3)
    other = {
        "BlurFFT": lambda: physics.BlurFFT((1, SIZE, SIZE), filter=taps),
        "Blur": lambda: physics.Blur(filter=taps, padding="circular"),
        "ours": lambda: Blur(taps[0, 0], padding_mode="circular"),
    }[kind]()
    red = RED(contraction(), 0.5, "weight")
    options = {"preconditioner": "exact", "gradient": gradient, "solver": Anderson(tol=1e-6)}
    model, alone = DEGrad(GaussianBlur(), red, **options), DEGrad(other, red, **options)
    own = model.blur
    d = torch.rand(3, 1, SIZE, SIZE, requires_grad=True)
    found, expected = model(d, other), alone(d)
    torch.testing.assert_close(found, expected)
    assert model.blur is own and isinstance(model.solution.iterations, torch.Tensor)
    (of_d,) = torch.autograd.grad(found.square().sum(), d, retain_graph=True)
    torch.testing.assert_close(of_d, torch.autograd.grad(expected.square().sum(), d, retain_graph=True)[0])
    torch.testing.assert_close(gradients(model, found.square().sum()), gradients(alone, expected.square().sum()))
    torch.testing.assert_close(model(d), DEGrad(own, red, **options)(d))


@pytest.mark.parametrize("gradient", ["jfb", "implicit"])
def test_a_physics_may_change_between_forward_and_backward(gradient):
    model = DEGrad(None, RED(contraction(), 0.5, "weight"), preconditioner="exact", gradient=gradient)
    d, changing, taps = torch.rand(2, 1, SIZE, SIZE), blurs(2), [kernels(2), kernels(2)]
    found = []
    for each in taps:
        changing.update(filter=each)
        found.append(model(d, changing).square().sum())
    changing.update(filter=kernels(2))
    together = gradients(model, sum(found))
    apart = [gradients(model, model(d, physics.BlurFFT((1, SIZE, SIZE), filter=each)).square().sum()) for each in taps]
    torch.testing.assert_close(together, [a + b for a, b in zip(*apart, strict=True)], rtol=1e-4, atol=1e-6)


def test_each_implicit_network_takes_the_operator_of_a_call():
    class Richardson(jfbfast.ImplicitNetwork):
        def step(self, x, d):
            return x - 0.5 * (self.blur.adjoint(self.blur(x) - d) + x)

    model, given = Richardson(None, solver=Anderson(tol=1e-6)), blurs(2)
    d = torch.rand(2, 1, SIZE, SIZE)
    expected = IterativeOperator(given).solve(given.A_adjoint(d), 1.0)
    torch.testing.assert_close(model(d, given), expected, rtol=0, atol=1e-5)


def test_the_settings_of_an_iterative_operator_serve_the_operator_of_a_call():
    model = DEGrad(IterativeOperator(blurs(1), tol=1e-2, max_iter=7), RED(contraction()), preconditioner="exact")
    bound = model.with_operator(physics.Blur(filter=kernels(1), padding="circular"))
    assert (bound.blur.tol, bound.blur.max_iter) == (1e-2, 7)
    assert [*map(id, bound.parameters())] == [*map(id, model.parameters())]


def test_an_automatic_averaging_found_with_the_operator_of_a_call_stays():
    model = DEGrad(None, RED(contraction(), 0.5), preconditioner="exact", averaging="auto")
    model(torch.rand(2, 1, SIZE, SIZE), blurs(2))
    assert 0 < float(model.averaging) <= 1


def test_the_penalty_and_the_report_take_a_network_with_its_operator():
    model, d = DEGrad(None, RED(contraction(), 0.5), preconditioner="exact"), torch.rand(2, 1, 8, 8)
    given = physics.BlurFFT((1, 8, 8), filter=kernels(2))
    model(d, given)
    bound = model.with_operator(given)
    assert jfbfast.jacobian_penalty(bound, d, bound=0.0).item() > 0
    assert jfbfast.diagnostics.report(bound, d, iterations=10, steps=3).contraction_factor.shape == (2,)


def test_universal_takes_a_blur_of_a_call_and_keeps_its_own():
    model = UniversalDEGrad(UNet(1, features=(4, 8), blocks=(1, 1), conditions=3, injection=5)).eval()
    blur, d = GaussianBlur(5, 2.0, padding_mode="reflect"), torch.rand(1, 1, SIZE, SIZE)
    before, condition = model(d), model.regularizer.condition
    found = model(d, blur)
    torch.testing.assert_close(model(d), before, rtol=0, atol=0)
    assert model.regularizer.condition is condition
    model.set_measurement(blur, model.noise)
    torch.testing.assert_close(model(d), found, rtol=0, atol=0)
    with pytest.raises(TypeError, match="blur is BlurFFT; it takes a SeparableBlur or a Blur"):
        model(d, blurs(1))


def test_wrong_operators_of_a_call_are_refused_in_a_sentence():
    model, d = small_model(), torch.rand(1, 1, SIZE, SIZE)
    with pytest.raises(ValueError, match="operator is None; a network whose blur is None takes one in each call"):
        model(d)
    with pytest.raises(TypeError, match="operator is Tensor, which cannot be called"):
        model(d, d)  # the start of a solve is x0=
    with pytest.raises(TypeError, match="operator is Physics, which has no adjoint"):
        model(d, physics.Physics(A=torch.square))
    with pytest.raises(TypeError, match="positional argument"):
        model(d, blurs(1), d)


def test_a_model_without_an_operator_is_copied_pickled_and_loaded():
    model, given, d = small_model(), blurs(2), torch.rand(2, 1, SIZE, SIZE)
    expected = model.eval()(d, given)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(d, given), expected, rtol=0, atol=0)
    fresh = small_model().eval()
    fresh.load_state_dict(model.state_dict())  # without a warning
    torch.testing.assert_close(fresh(d, given), expected, rtol=0, atol=0)


NOISE = 0.05


def denoising():
    return physics.Denoising(physics.GaussianNoise(NOISE))


def inpainting():
    return physics.Inpainting((1, SIZE, SIZE), mask=0.6, noise_model=physics.GaussianNoise(NOISE))


def blurring():
    return physics.BlurFFT((1, SIZE, SIZE), filter=torch.ones(1, 1, 3, 3) / 9, noise_model=physics.GaussianNoise(NOISE))


SHIFT = deepinv.transform.Shift()
LOSSES = {
    "supervised": (blurring, lambda: losses.SupLoss()),
    "SURE": (blurring, lambda: losses.SureGaussianLoss(sigma=NOISE)),
    "R2R": (blurring, lambda: losses.R2RLoss(noise_model=physics.GaussianNoise(NOISE), eval_n_samples=2)),
    "EI": (inpainting, lambda: [losses.MCLoss(), losses.EILoss(SHIFT)]),
    "MOI": (
        inpainting,
        lambda: [
            losses.MCLoss(),
            losses.MOILoss(physics_generator=physics.generator.BernoulliSplittingMaskGenerator((1, SIZE, SIZE), 0.6)),
        ],
    ),
    "splitting": (inpainting, lambda: losses.SplittingLoss(split_ratio=0.7, eval_n_samples=2)),
    "Neighbor2Neighbor": (denoising, lambda: losses.Neighbor2Neighbor()),
    "score": (denoising, lambda: losses.ScoreLoss(physics.GaussianNoise(NOISE), 10)),
}


@pytest.mark.filterwarnings("ignore::jfbfast.ConvergenceWarning")  # of a model at the start of its training
@pytest.mark.filterwarnings("ignore:Mask generator not defined", "ignore:At least one input physics")  # of deepinv
@pytest.mark.filterwarnings("ignore:Generating online measurements")
@pytest.mark.parametrize("gradient", ["jfb", pytest.param("implicit", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LOSSES)
def test_deepinvs_trainer_trains_the_model_by_each_loss(name, gradient, tmp_path):
    operator, loss = (make() for make in LOSSES[name])
    model = small_model(gradient=gradient)
    before = [p.detach().clone() for p in model.parameters()]
    loader = DataLoader([{"x": x} for x in torch.rand(4, 1, SIZE, SIZE)], batch_size=2)
    options = {"device": "cpu", "verbose": False, "online_measurements": True, "non_blocking_transfers": False}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    trained = deepinv.Trainer(
        model, operator, optimizer, loader, 1, losses=loss, save_path=tmp_path, check_grad=True, **options
    ).train()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert all(moved)
    assert torch.tensor(deepinv.test(trained, loader, operator, **options)["PSNR"]).isfinite()


def test_deepinvs_trainer_takes_a_generator_of_kernels_and_loads_its_best_model(tmp_path):
    model, operator = small_model(), blurring()
    loader = DataLoader([{"x": x} for x in torch.rand(4, 1, SIZE, SIZE)], batch_size=2)
    trainer = deepinv.Trainer(
        model,
        operator,
        torch.optim.Adam(model.parameters(), lr=1e-3),
        loader,
        2,
        eval_dataloader=loader,
        physics_generator=physics.generator.MotionBlurGenerator((5, 5)),
        online_measurements=True,
        save_path=tmp_path,
        device="cpu",
        verbose=False,
        non_blocking_transfers=False,
    )
    trainer.train()
    assert operator.filter.shape[0] == 2  # one kernel for each sample of the last batch
    assert trainer.load_best_model() is model


def test_a_denoiser_of_deepinv_is_no_regulariser():
    told = r"regularizer is a denoiser of deepinv, a MedianFilter; it takes R, so wrap the denoiser: RED\(MedianFilter"
    with pytest.raises(ValueError, match=told):
        DEGrad(GaussianBlur(), deepinv.models.MedianFilter())


def test_red_tells_a_denoiser_its_noise_level():
    seen = []

    def denoiser(x, sigma):
        seen.append(sigma)
        return x * (1 - torch.as_tensor(sigma).view(-1, 1, 1, 1))

    x = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    fixed, learnt = RED(denoiser, 0.5, noise=0.1), RED(denoiser, 0.5, noise=0.1, learn_noise=True).double()
    torch.testing.assert_close(fixed(x), 0.05 * x)
    torch.testing.assert_close(learnt(x), 0.05 * x)
    assert seen[0] == 0.1 and seen[1].shape == (2,)
    assert len([*fixed.parameters()]) == 1 and fixed.noise == 0.1
    log_noise = learnt.log_noise.detach().requires_grad_()
    assert gradcheck(lambda log: torch.func.functional_call(learnt, {"log_noise": log}, (x,)), log_noise)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.0}, "noise is 0.0; it takes a positive"),
        ({"noise": 0.1, "injection": True}, "noise is 0.1; a denoiser with injection takes None"),
        ({"learn_noise": True}, "noise is None; learn_noise takes a positive number"),
    ],
)
def test_a_noise_level_that_red_cannot_use_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RED(nn.Identity(), **options)


def test_a_size_that_a_denoiser_refuses_is_refused_in_its_own_words():
    model = DEGrad(None, RED(nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2))))
    with pytest.raises(RuntimeError, match="divisible by downscale_factor"):
        model(torch.rand(1, 1, 9, 9), physics.Denoising())
