"""DE-GRAD as a module: its operators, its modes, what it refuses."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import jfbfast
from helpers.models import networks
from jfbfast import (
    RED,
    Anderson,
    ConvergenceWarning,
    DEGrad,
    DnCNN,
    GaussianBlur,
    IterativeOperator,
    NonexpansiveDenoiser,
    Picard,
    Status,
    UNet,
)


def test_a_network_that_does_not_contract_warns_and_stays_finite():
    model = networks()["paper"].eval()
    with torch.no_grad():
        for parameter in model.regularizer.parameters():
            parameter *= 3
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight *= 4
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        out = model(torch.randn(2, 3, 12, 12))
    assert out.isfinite().all()
    assert set(model.solution.status.tolist()) <= {Status.DIVERGED, Status.MAX_ITER}


def test_no_grad_and_inference_mode_give_the_same_and_zero_tolerance_never_warns():
    model = networks()["filtered"].eval()
    d = torch.randn(1, 3, 8, 8)
    expected = model(d)
    assert expected.requires_grad
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = model(d)
        assert not out.requires_grad
        torch.testing.assert_close(out, expected)
    model.solver = Anderson(tol=0, max_iter=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(d)


def test_a_warm_start_saves_evaluations():
    model = networks()["filtered"].eval()
    d = torch.randn(2, 3, 12, 12)
    model(d)
    first, start = model.solution.iterations.clone(), model.solution.value
    model(d, x0=start)
    assert (model.solution.iterations == 1).all() and (first > 1).all()


def test_deepcopy_pickle_and_state_dict_keep_the_output():
    model = networks()["filtered"].eval()
    d = torch.randn(1, 3, 8, 8)
    expected = model(d)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(d), expected, rtol=0, atol=0)
    other = networks()["filtered"].eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(d), expected, rtol=0, atol=0)


def test_it_works_under_torch_compile():
    model = networks()["filtered"].eval()
    d = torch.randn(1, 3, 8, 8)
    compiled = torch.compile(model)
    torch.testing.assert_close(compiled(d), model(d))
    compiled(d).sum().backward()
    assert model.regularizer.log_weight.grad is not None


def test_any_operator_with_forward_and_adjoint_works():
    class Mask(nn.Module):
        mask = (torch.arange(64).view(8, 8) % 3 > 0).double()

        def forward(self, x):
            return self.mask * x

        adjoint = forward

    model = DEGrad(Mask(), RED(nn.Conv2d(1, 1, 3, padding=1), 0.2), step_size=0.7).double().eval()
    d = Mask()(torch.randn(1, 1, 8, 8, dtype=torch.float64))
    model.solver = Anderson(tol=1e-6, max_iter=300)
    out = model(d)
    residual = Mask().adjoint(Mask()(out) - d) + model.regularizer(out)
    assert residual.norm() < 1e-4 * out.norm()


class Mean(nn.Module):
    def forward(self, x, z):
        return (x + z) / 2


def injected(operator):
    torch.manual_seed(0)
    denoiser = UNet(3, (4, 6), (1, 1), injection=True)
    with torch.no_grad():
        denoiser.tail.weight *= 10
    return DEGrad(operator, RED(denoiser, 0.1, "weight"), preconditioner="exact").double().eval()


def test_an_injected_denoiser_sees_the_measurement():
    blur, x, d = GaussianBlur(), *torch.randn(2, 2, 3, 12, 10, dtype=torch.float64)
    model = injected(blur)
    weight, denoiser = model.damping.detach(), model.regularizer.denoiser
    restored = blur.solve(blur.adjoint(d), weight)
    expected = blur.solve(blur.adjoint(d) + weight * denoiser(blur.filter(x, weight), restored), weight)
    torch.testing.assert_close(model.layer(x, d), expected)
    x.requires_grad_(), d.requires_grad_()
    assert torch.autograd.gradcheck(model.layer, (x[:1, :, :4, :5], d[:1, :, :4, :5]), fast_mode=True)

    class Plain(nn.Module):
        """An operator with only forward and adjoint."""

        forward = staticmethod(blur.forward)
        adjoint = staticmethod(blur.adjoint)

    torch.testing.assert_close(injected(Plain()).layer(x, d), expected)


def test_missing_arguments_of_an_injection_are_named():
    blur, x = GaussianBlur(), torch.randn(1, 3, 8, 8)
    red = RED(UNet(3, (4,), (1,), injection=True))
    with pytest.raises(ValueError, match=r"operator is NoneType; this RED takes one with adjoint, solve"):
        red(x)
    with pytest.raises(ValueError, match="d is None; a RED with injection takes the measurements"):
        red(x, blur)
    with pytest.raises(ValueError, match="z is None; this network takes a second image"):
        red.denoiser(x)
    with pytest.raises(ValueError, match="z is an image; this network takes None"):
        UNet(3, (4,), (1,))(x, x)
    for own, asked in ((True, False), (False, True)):
        with pytest.raises(ValueError, match=f"injection is {asked}; it takes that of the UNet, {own}"):
            RED(UNet(3, (4,), (1,), injection=own), injection=asked)
    with pytest.raises(ValueError, match="injection is 0; it takes an integer of at least 1"):
        UNet(injection=0)


def test_any_denoiser_of_two_images_can_take_an_injection():
    blur, x, d = GaussianBlur(), *torch.randn(2, 1, 3, 8, 8, dtype=torch.float64)
    model = DEGrad(blur, RED(Mean(), 0.1, injection=True), preconditioner="exact").double()
    weight = model.damping.detach()
    restored = blur.solve(blur.adjoint(d), weight)
    expected = restored + weight * blur.solve((x + restored) / 2, weight)
    torch.testing.assert_close(model.layer(x, d), expected)


class NotCallable:
    def forward(self, x):
        return x

    adjoint = forward


def test_the_repr_shows_the_form():
    told = repr(DEGrad(GaussianBlur(), RED(DnCNN(1, 2, 2), 0.25), preconditioner="exact", gradient="neumann"))
    assert "damping=0.25, averaging=1, preconditioner='exact', solver=Anderson(tol=0.001" in told
    assert "gradient=Neumann(terms=5)" in told
    assert "step_size=0.5, averaging=1, preconditioner=None" in repr(
        DEGrad(GaussianBlur(), DnCNN(1, 2, 2), step_size=0.5)
    )


def test_a_physics_of_deepinv_is_an_operator():
    class Physics(nn.Module):
        blur = GaussianBlur(padding_mode="circular")
        filter = torch.ones(5)

        def forward(self, x):
            return self.A(x) + torch.randn_like(x)

        def A(self, x):
            return self.blur(x)

        def A_adjoint(self, y):
            return self.blur.adjoint(y)

    regularizer = RED(DnCNN(1, 4, 3, residual=True), 0.2).eval()
    d = torch.randn(1, 1, 8, 8)
    x = torch.randn(1, 1, 8, 8)
    theirs, ours = (DEGrad(operator, regularizer, step_size=0.7) for operator in (Physics(), Physics.blur))
    torch.testing.assert_close(theirs.layer(x, d), ours.layer(x, d))
    filtered = RED(regularizer.denoiser, 0.2, "weight")
    ours = DEGrad(Physics.blur, filtered, preconditioner="exact")
    for operator in (Physics(), IterativeOperator(Physics())):
        theirs = DEGrad(operator, filtered, preconditioner="exact")
        torch.testing.assert_close(theirs.start(d), ours.start(d), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs.layer(x, d), ours.layer(x, d), rtol=1e-4, atol=1e-4)


class Luminance(nn.Module):
    """Maps three channels to one, which would broadcast."""

    def forward(self, x):
        return x.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DEGrad(nn.Identity(), DnCNN(1, 2, 2)), TypeError, "blur is Identity, which has no adjoint"),
        (lambda: DEGrad(NotCallable(), DnCNN(1, 2, 2)), TypeError, "blur is NotCallable, which cannot be called"),
        (lambda: IterativeOperator(nn.Identity()), TypeError, "operator is Identity, which has no adjoint"),
        (
            lambda: DEGrad(GaussianBlur, DnCNN(1, 2, 2)),
            TypeError,
            "blur is the class GaussianBlur; it takes an instance",
        ),
        (lambda: RED(UNet), TypeError, "denoiser is <class .*UNet.*; it takes a module"),
        (
            lambda: DEGrad(GaussianBlur(), UNet(1, (2,), (1,))),
            ValueError,
            "regularizer is a denoiser, a UNet; it takes",
        ),
        (
            lambda: DEGrad(GaussianBlur(), DnCNN(1, 2, 2, residual=True)),
            ValueError,
            "regularizer is a denoiser, a DnCNN",
        ),
        (lambda: DEGrad(GaussianBlur(), DnCNN(1, 2, 2), step_size=-1), ValueError, "step_size is -1"),
        (lambda: DEGrad(GaussianBlur(), DnCNN(1, 2, 2), averaging=1.5), ValueError, "averaging is 1.5"),
        (lambda: DEGrad(GaussianBlur(), DnCNN(1, 2, 2), damping=0.1), ValueError, "damping is 0.1"),
        (
            lambda: DEGrad(GaussianBlur(), DnCNN(1, 2, 2), preconditioner="exact"),
            ValueError,
            "damping is None",
        ),
        (
            lambda: DEGrad(GaussianBlur(), DnCNN(1, 2, 2), preconditioner="cg"),
            ValueError,
            "preconditioner is 'cg'",
        ),
        (lambda: DEGrad(GaussianBlur(), DnCNN(1, 2, 2), gradient="bptt"), ValueError, "gradient is 'bptt'"),
        (
            lambda: DEGrad(GaussianBlur(), RED(DnCNN(1, 2, 2)), preconditioner="exact", step_size=0.5),
            ValueError,
            "step_size is 0.5",
        ),
        (lambda: DEGrad(GaussianBlur(), DnCNN(1, 2, 2))(torch.zeros(1, 8, 8)), ValueError, "d has shape"),
        (
            lambda: DEGrad(GaussianBlur(), DnCNN(1, 2, 2))(torch.zeros(1, 1, 8, 8), x0=torch.zeros(1, 1, 8, 9)),
            ValueError,
            "x0 has shape",
        ),
        (lambda: RED(DnCNN(1, 2, 2), weight=0.0), ValueError, "weight is 0.0"),
        (lambda: RED(DnCNN(1, 2, 2), filter_damping=-1.0), ValueError, "filter_damping is -1.0"),
        (lambda: RED(DnCNN(1, 2, 2), filter_damping="yes"), ValueError, "filter_damping is 'yes'"),
        (
            lambda: RED(DnCNN(1, 2, 2), filter_damping=0.1)(torch.zeros(1, 1, 4, 4)),
            ValueError,
            "operator is NoneType",
        ),
        (lambda: DEGrad(GaussianBlur(), DnCNN), TypeError, "regularizer is <class"),
        (lambda: DEGrad(GaussianBlur(), DnCNN(1, 2, 2))(torch.zeros(1, 1, 8, 8).numpy()), TypeError, "d is a ndarray"),
        (
            lambda: DEGrad(GaussianBlur(), DnCNN(3, 2, 2))(torch.zeros(2, 1, 8, 8)),
            ValueError,
            r"x has shape \(2, 1, 8, 8\); it takes images \(B, 3, H, W\)",
        ),
        (
            lambda: DEGrad(GaussianBlur(), RED(Luminance()))(torch.zeros(2, 3, 8, 8)),
            ValueError,
            r"denoiser maps shape \(2, 3, 8, 8\) to \(2, 1, 8, 8\); it takes one that keeps the shape",
        ),
        (
            lambda: DEGrad(IterativeOperator(GaussianBlur()), Luminance())(torch.zeros(2, 3, 8, 8)),
            ValueError,
            r"regularizer maps shape \(2, 3, 8, 8\) to \(2, 1, 8, 8\)",
        ),
        (
            lambda: DEGrad(GaussianBlur(), RED(NonexpansiveDenoiser(1, 2, 2)))(torch.zeros(1, 1, 8, 8).double()),
            ValueError,
            "d is torch.float64; it takes the dtype",
        ),
        (
            lambda: DEGrad(GaussianBlur(), DnCNN(1, 2, 2), solver=Picard(), gradient="shine")(torch.zeros(1, 1, 8, 8)),
            ValueError,
            "gradient is Shine.*; it takes a solver with a history",
        ),
        (lambda: DnCNN(depth=1), ValueError, "depth is 1"),
        (lambda: DnCNN(norm="layer"), ValueError, "norm is 'layer'"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_forward_that_raises_clears_the_old_solution():
    model = networks()["filtered"]
    model(torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match="x has shape"):
        model(torch.randn(1, 4, 8, 8))
    assert model.solution is None


def test_a_wrong_solver_regulariser_or_start_is_refused():
    blur, red = GaussianBlur(), jfbfast.RED(nn.Identity())
    for wrong in (jfbfast.Anderson, "anderson"):
        with pytest.raises(TypeError, match=r"solver is .*; it takes an instance, such as Anderson"):
            DEGrad(blur, red, solver=wrong)
        with pytest.raises(TypeError, match=r"solver is .*; it takes an instance, such as Anderson"):
            jfbfast.fixed_point(torch.tanh, torch.zeros(1, 2), solver=wrong)
    with pytest.raises(TypeError, match="regularizer is None; it takes a module"):
        DEGrad(blur, None)
    d = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"x0 is torch.float64 on cpu; it takes what d is, torch.float32 on cpu"):
        DEGrad(blur, red)(d, x0=d.double())
    for name, wrong in (("tol", "1e-3"), ("max_iter", True)):
        with pytest.raises(ValueError, match=f"{name} is {wrong!r}; it takes"):
            jfbfast.Anderson(**{name: wrong})


def test_complex_measurements_take_a_real_start():
    class Fourier(nn.Module):
        def forward(self, x):
            return torch.fft.fft2(x, norm="ortho")

        def adjoint(self, y):
            return torch.fft.ifft2(y, norm="ortho").real

    model = DEGrad(Fourier(), RED(DnCNN(1, 4, 3, residual=True), 0.2, "weight"), preconditioner="exact").eval()
    d = Fourier()(torch.randn(2, 1, 8, 8))
    model(d)
    model(d, x0=model.solution.value).sum().backward()
    assert (model.solution.iterations == 1).all()
    with pytest.raises(ValueError, match=r"x0 is torch.float64 on cpu; it takes what Aᵀd is, torch.float32 on cpu"):
        model(d, x0=model.solution.value.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_measurements_of_another_dtype_than_the_network_are_refused(dtype):
    model, d = networks()["filtered"], torch.randn(1, 3, 8, 8, dtype=dtype)
    with pytest.raises(ValueError, match=f"d is {dtype}; it takes the dtype of the network's parameters"):
        model(d)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if dtype == torch.bfloat16:
            with torch.autocast("cpu", dtype):
                model(d)
        model.regularizer.denoiser.register_forward_pre_hook(lambda module, args: args[0].float())
        model(d)


def test_the_transforms_of_torch_func_are_refused():
    model, d = networks()["filtered"].eval(), torch.randn(2, 1, 3, 8, 8)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"within torch.func's grad or vmap"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (d[0],)).sum())(parameters)
    with pytest.raises(RuntimeError, match=r"within torch.func's grad or vmap"), torch.no_grad():
        torch.func.vmap(model)(d)


def test_a_frozen_torchscript_module_can_be_the_denoiser():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        frozen = torch.jit.freeze(torch.jit.script(nn.Conv2d(3, 3, 3, padding=1).eval()))
    model = DEGrad(GaussianBlur(), RED(frozen, 0.1, "weight"), preconditioner="exact")
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    assert model.training


def test_a_network_class_that_forbids_subclasses_works():
    class Final(nn.Module):
        def __init_subclass__(cls):
            raise ValueError(f"{cls.__name__} is registered")

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return 0.1 * self.conv(x)

    DEGrad(GaussianBlur(), Final(), solver=Anderson(tol=0, max_iter=3))(torch.randn(1, 3, 8, 8))


def test_an_object_without_the_attributes_of_a_solver_is_refused():
    class Half:
        def solve(self, layer, x0, inputs=()):
            raise AssertionError

    with pytest.raises(TypeError, match=r"solver is .*; it takes an instance, such as Anderson"):
        DEGrad(GaussianBlur(), DnCNN(1, 2, 2), solver=Half())
