"""Models as directories, and on the Hugging Face hub."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import deepinv
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import jfbfast
from jfbfast import (
    DEADMM,
    RED,
    Anderson,
    Blur,
    DEGrad,
    DEProx,
    DnCNN,
    GaussianBlur,
    SeparableBlur,
    UNet,
    UniversalDEGrad,
)
from jfbfast.models.checkpoint import CheckpointError, save_checkpoint
from jfbfast.models.config import ModelConfig
from jfbfast.models.feed_forward import FeedForward
from jfbfast.operators.data_fidelity import Poisson, WeightedLeastSquares


def unet(**options):
    return UNet(1, features=(4, 8), blocks=(1, 1), **options)


def filtered(blur, network=None, **options):
    return DEGrad(blur, RED(network or unet(), filter_damping="weight"), preconditioner="exact", **options)


def weighted():
    return WeightedLeastSquares(torch.linspace(0, 1, 20))


def universal():
    model = UniversalDEGrad(unet(conditions=3, injection=5), gradient="neumann", noise_range=(0.0, 0.2))
    model.set_measurement(Blur(jfbfast.point_spread.motion(length=5, angle=30), padding_mode="valid"), 0.03)
    model.solver = Anderson(tol=1e-2, memory=3)  # after the construction
    return model


PSF = jfbfast.point_spread.motion(length=3, angle=30)
TAPS = torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1], [0.3, 0.4, 0.1, 0.1, 0.1]])
MODELS = {
    "README's": lambda: filtered(GaussianBlur(5, 1.0, "reflect"), unet(injection=True)),
    "paper": lambda: DEGrad(SeparableBlur(*TAPS, "replicate"), DnCNN(1, 4, 4), step_size=0.3, averaging=0.7),
    "separable": lambda: filtered(Blur(torch.outer(*TAPS), "zeros"), DnCNN(1, 4, 3, residual=True)),
    "any blur": lambda: filtered(Blur(PSF, "reflect", tol=1e-3, max_iter=77), averaging="auto"),
    "iterative": lambda: filtered(jfbfast.IterativeOperator(GaussianBlur(3), tol=1e-3), solve_dtype=torch.bfloat16),
    "preconditioned": lambda: DEGrad(
        GaussianBlur(sigma=(1.0, 2.0)),
        RED(jfbfast.NonexpansiveDenoiser(1, 4, 3), weight=torch.tensor(0.1), filter_damping=0.2),
        preconditioner="exact",
        damping=0.3,
        solver=jfbfast.Broyden(tol=1e-2),
        gradient=jfbfast.Implicit("gmres", tol=1e-6),
    ),
    "float64": lambda: filtered(GaussianBlur()).double(),
    "universal": universal,
    "universal float64": lambda: universal().double(),
    "DE-PROX": lambda: DEProx(GaussianBlur(), unet(), preconditioner="exact", weight=0.2, averaging=0.5),
    "DE-ADMM": lambda: DEADMM(GaussianBlur(), unet(), solver=Anderson(memory=3), data_fidelity=weighted()),
    "Poisson": lambda: DEGrad(GaussianBlur(), RED(unet()), step_size=0.1, data_fidelity=Poisson(0.1, background=1)),
    "feed-forward": lambda: FeedForward(GaussianBlur(), DnCNN(1, 4, 3, norm=None, residual=True), weight=0.01),
    "denoiser": lambda: DnCNN(1, 4, 4, spectral_norm="conv"),
}


def trained(model):
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    return model.eval()


def image(model):
    return torch.rand(2, 1, 17, 20, dtype=next(model.parameters()).dtype)


@pytest.mark.filterwarnings("ignore::jfbfast.ConvergenceWarning")
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_has_equal_outputs_bit_for_bit(tmp_path, name):
    model = trained(MODELS[name]())
    model.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["README.md", "config.json", "model.safetensors"]
    loaded = type(model).from_pretrained(tmp_path / "new" / "folder")
    assert repr(loaded) == repr(model) and not loaded.training
    d = image(model)
    assert torch.equal(loaded(d), model(d))
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
    if isinstance(model, UniversalDEGrad):
        assert (loaded.noise, loaded.noise_range, loaded.solver.memory) == (0.03, (0.0, 0.2), 3)


def test_a_copied_a_pickled_and_a_loaded_model_can_be_saved(tmp_path):
    model = trained(MODELS["universal"]())
    for i, each in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        each.save_pretrained(tmp_path / str(i))
        again = UniversalDEGrad.from_pretrained(tmp_path / str(i))
        again.save_pretrained(tmp_path / f"again-{i}")
        first, second = (tmp_path / name for name in (str(i), f"again-{i}"))
        assert (first / "config.json").read_text() == (second / "config.json").read_text()
        tensors = load_file(second / "model.safetensors")
        for name, value in load_file(first / "model.safetensors").items():
            assert torch.equal(tensors.pop(name), value)
        assert not tensors


@pytest.mark.filterwarnings("ignore::jfbfast.ConvergenceWarning")
def test_the_shipped_models_can_be_saved_and_set(tmp_path):
    for name in jfbfast.pretrained_names():
        kind = jfbfast.PlugAndPlay if name == "plug-and-play" else DEGrad
        kind.from_pretrained(name).save_pretrained(tmp_path / name)
    model = DEGrad.from_pretrained(tmp_path / "universal", sigma=2.0, noise=0.05)
    expected = DEGrad.from_pretrained("universal", sigma=2.0, noise=0.05)
    d = torch.rand(1, 3, 24, 26)
    assert torch.equal(model(d), expected(d))
    with pytest.raises(
        ValueError, match=r"sigma is 2\.0 and noise None; .* takes neither, since it is for GaussianBlur"
    ):
        DEGrad.from_pretrained(tmp_path / "gaussian5-sigma1", sigma=2.0)


ELSEWHERE = """
import sys

class Refused:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {"huggingface_hub", "lightning", "yaml", "scipy"}:
            raise ModuleNotFoundError("refused", name=name)

sys.meta_path.insert(0, Refused)
import torch, jfbfast
assert not {"huggingface_hub", "onnx", "onnxscript", "httpx"} & set(sys.modules)
model = jfbfast.DEGrad.from_pretrained("saved")
d, expected = torch.load("tensors.pt")
assert torch.equal(model(d), expected)
assert jfbfast.DEGrad.from_pretrained("gaussian5-sigma1").blur.sigma == (1.0, 1.0)
try:
    jfbfast.DEGrad.from_pretrained("somebody/model")
except ModuleNotFoundError as error:
    assert "pip install 'jfbfast[hub]'" in str(error), error
else:
    raise AssertionError("a refused package served")

sys.meta_path.remove(Refused)  # and now with huggingface_hub's real client and its cache
model = jfbfast.UNet.from_pretrained("somebody/denoiser")
assert model.channels == 1 and not model.training
try:
    jfbfast.UNet.from_pretrained("somebody/another")
except ValueError as error:
    assert "name is 'somebody/another'" in str(error) and "\\n" not in str(error), error
else:
    raise AssertionError
"""


@pytest.mark.usefixtures("one_thread")
def test_another_process_loads_it_offline_and_without_the_hub(tmp_path):
    model = trained(MODELS["README's"]())
    d = torch.rand(2, 1, 16, 20)
    model.save_pretrained("saved")
    torch.save((d, model(d)), "tensors.pt")
    cache = tmp_path / "cache" / "models--somebody--denoiser"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    unet().save_pretrained(cache / "snapshots" / ("0" * 40))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", ELSEWHERE], env=environment, check=True)


class Theirs(nn.Module):
    """A denoiser of a user's, with tied weights and a buffer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 1, 3, padding=1)
        self.second = nn.Conv2d(1, 1, 3, padding=1)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return x + 0.1 * self.second(self.first(x).relu())


def test_a_users_denoiser_and_operator_are_passed_and_get_their_weights(tmp_path):
    physics = deepinv.physics.Inpainting((1, 17, 20), mask=(torch.rand(1, 17, 20) > 0.5).float())
    model = trained(filtered(physics, Theirs()))
    model.save_pretrained(tmp_path)
    told = (
        r"its blur is a Inpainting, which is not of jfbfast, so pass one like it: DEGrad\.from_pretrained\(…, blur=…\)"
    )
    with pytest.raises(CheckpointError, match=told):
        DEGrad.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"its regularizer\.denoiser is a Theirs, .*denoiser=…"):
        DEGrad.from_pretrained(tmp_path, blur=physics)
    with pytest.raises(CheckpointError, match="it has no solver to be passed; it takes blur=, denoiser="):
        DEGrad.from_pretrained(tmp_path, blur=physics, denoiser=Theirs(), solver=Anderson())
    with pytest.raises(CheckpointError, match=r"its network has a tensor regularizer\.denoiser\.bias"):
        DEGrad.from_pretrained(tmp_path, blur=physics, denoiser=nn.Conv2d(1, 1, 3, padding=1))
    loaded = DEGrad.from_pretrained(tmp_path, blur=physics, denoiser=Theirs())
    assert loaded.regularizer.denoiser.second.weight is loaded.regularizer.denoiser.first.weight
    d = physics.A(torch.rand(2, 1, 17, 20))
    assert torch.equal(loaded(d), model(d))
    assert "denoiser=…" in (tmp_path / "README.md").read_text()


def test_a_physics_that_is_passed_stays_as_it_is(tmp_path):
    blur = torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64)
    physics = deepinv.physics.BlurFFT((1, 17, 20), filter=blur)
    before = {name: value.clone() for name, value in physics.named_buffers()}
    assert {torch.float64, torch.complex128} <= {value.dtype for value in before.values()}
    filtered(physics).save_pretrained(tmp_path)
    loaded = DEGrad.from_pretrained(tmp_path, blur=physics)
    assert next(loaded.parameters()).dtype == torch.float32
    for name, value in physics.named_buffers():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])


class Richardson(jfbfast.ImplicitNetwork):
    """A layer of a user's, with a learnable step."""

    def __init__(self, blur, channels, *, power=1.0, **options):
        super().__init__(blur, **options)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.5))
        self.power = power

    def step(self, x, d):
        return x - self.scale**self.power * (self.blur.gradient(x, d) + 0.1 * x)


def test_a_users_implicit_network_is_loaded_by_its_own_class(tmp_path):
    model = trained(Richardson(GaussianBlur(), channels=3, power=2.0, solver=Anderson(tol=1e-4)))
    model.save_pretrained(tmp_path)
    loaded, d = Richardson.from_pretrained(tmp_path), torch.rand(1, 3, 9, 8)
    assert torch.equal(loaded(d), model(d)) and loaded.solver == model.solver
    with pytest.raises(CheckpointError, match="kind 'Richardson'"):
        DEGrad.from_pretrained(tmp_path)


class Landweber(Richardson):
    """A layer of a user's, whose constructor takes no options."""

    def __init__(self, blur):
        super().__init__(blur, 1, solver=jfbfast.Picard())


def test_options_are_saved_whether_or_not_the_constructor_takes_them(tmp_path):
    model = Landweber(GaussianBlur())
    model.solver, model.gradient = Anderson(tol=1e-4, memory=3), jfbfast.Neumann(terms=3)
    model.averaging, model.solve_dtype = 0.7, torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = Landweber.from_pretrained(tmp_path)
    for name in ("solver", "gradient", "averaging", "solve_dtype"):
        assert getattr(loaded, name) == getattr(model, name)
    assert Landweber(GaussianBlur()).solver == jfbfast.Picard()


def test_directories_and_files_of_training_load_as_before(tmp_path):
    config = ModelConfig(denoiser={"kind": "UNet", "features": [4], "blocks": [1]})
    save_checkpoint(tmp_path / "model.safetensors", config.model(), config)
    for name in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        assert DEGrad.from_pretrained(name).blur.kernel_size == (5, 5)
    with pytest.raises(CheckpointError, match="it takes no denoiser; it has all that its settings name"):
        DEGrad.from_pretrained(tmp_path, denoiser=Theirs())
    with pytest.raises(CheckpointError, match="a filtered network; it takes a UNet"):
        UNet.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="there is no such file; the published models are gaussian5-sigma1"):
        DEGrad.from_pretrained("no-such-name")


@pytest.mark.filterwarnings("ignore::jfbfast.ConvergenceWarning")
@pytest.mark.parametrize("start", [torch.tensor(0.5), torch.linspace(0.1, 1, 20)])
def test_weights_of_a_data_fidelity_that_are_trained_are_loaded(tmp_path, start):
    model = trained(DEADMM(GaussianBlur(), unet(), data_fidelity=WeightedLeastSquares(nn.Parameter(start.clone()))))
    model.save_pretrained(tmp_path)
    loaded, d = DEADMM.from_pretrained(tmp_path), image(model)
    assert isinstance(loaded.data_fidelity.weights, nn.Parameter) and torch.equal(loaded(d), model(d))


def test_the_card_has_the_metadata_of_the_hub_and_keeps_its_text(tmp_path):
    model = filtered(GaussianBlur())
    model.save_pretrained(tmp_path, license="mit", datasets=["a/b", "kodak"], metrics={"psnr": 34, "ssim": 0.9})
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.datasets, card.data.library_name) == ("mit", ["a/b", "kodak"], "jfbfast")
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"psnr": 34, "ssim": 0.9} and card.data.eval_results[0].dataset_name == "kodak"
    assert card.data.pipeline_tag == "image-to-image"
    assert card.data.tags == ["deblurring", "deep-equilibrium", "image-restoration", "jfbfast"]
    assert "from jfbfast import DEGrad" in card.text
    unet().save_pretrained(tmp_path / "denoiser")
    card = huggingface_hub.ModelCard.load(tmp_path / "denoiser" / "README.md")
    assert card.data.tags == ["denoising", "image-restoration", "jfbfast"] and card.data.license is None
    text = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(text + "\nMeasured by hand.\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == text + "\nMeasured by hand.\n"
    model.save_pretrained(tmp_path, license="cc-by-4.0")
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "cc-by-4.0" and card.text.endswith("Measured by hand.\n")


class FakeHub:
    """A hub in a folder, with the signatures of huggingface_hub's own client."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        client = mock.create_autospec(huggingface_hub.HfApi, instance=True)
        client.create_repo.side_effect = lambda repo_id, **_: SimpleNamespace(repo_id=repo_id)
        client.file_exists.side_effect = lambda repo_id, name: (folder / repo_id / name).is_file()
        client.hf_hub_download.side_effect = lambda repo_id, name: str(folder / repo_id / name)
        client.upload_folder.side_effect = self.upload
        self.client = client
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: client)
        fetch = mock.create_autospec(huggingface_hub.snapshot_download, side_effect=self.download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)

    def upload(self, *, repo_id, folder_path, **_):
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return f"https://huggingface.co/{repo_id}/commit/1"

    def download(self, repo_id, **_):
        if not (self.folder / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such repository")
        return str(self.folder / repo_id)


def test_a_model_goes_to_the_hub_and_comes_back(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub", monkeypatch)
    model = trained(MODELS["any blur"]())
    assert model.push_to_hub("somebody/blurs", license="mit", private=True, branch="dev").endswith("/commit/1")
    hub.client.create_repo.assert_called_once_with("somebody/blurs", private=True, exist_ok=True)
    assert hub.client.upload_folder.call_args.kwargs["revision"] == "dev"
    loaded, d = DEGrad.from_pretrained("somebody/blurs", revision="dev"), image(model)
    assert torch.equal(loaded(d), model(d))
    assert huggingface_hub.snapshot_download.call_args.kwargs["revision"] == "dev"
    card = tmp_path / "hub" / "somebody" / "blurs" / "README.md"
    card.write_text(card.read_text() + "\nBy hand.\n")
    model.push_to_hub("somebody/blurs", license="apache-2.0")
    assert card.read_text().endswith("\nBy hand.\n") and "apache-2.0" in card.read_text()
    with pytest.raises(CheckpointError, match=r"name is 'nobody/none'.*\(no such repository\); the published"):
        DEGrad.from_pretrained("nobody/none")


def test_the_config_is_plain_json_that_can_be_edited(tmp_path):
    filtered(GaussianBlur(5)).save_pretrained(tmp_path)
    file = Path(tmp_path / "config.json")
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model"]["solver"] = {"kind": "Picard", "tol": 0.01}
    file.write_text(json.dumps(config), encoding="utf-8")
    assert DEGrad.from_pretrained(tmp_path).solver == jfbfast.Picard(tol=0.01)
