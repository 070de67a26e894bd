"""Trained networks as files, and the models that ship with the package."""

import os

import pytest
import torch

import jfbfast
from jfbfast import RED, DEGrad, DnCNN, UniversalDEGrad
from jfbfast.models import pretrained
from jfbfast.models.checkpoint import CheckpointError, load_checkpoint, read_config, save_checkpoint
from jfbfast.models.config import FORMS, ModelConfig

DENOISER = {
    "kind": "DnCNN",
    "features": 4,
    "depth": 3,
    "norm": None,
    "spectral_norm": False,
    "bias": True,
    "residual": True,
}
SMALL = ModelConfig(denoiser=DENOISER)
CONFIGS = {
    "paper": ModelConfig("paper", {"kind": "DnCNN", "features": 4, "depth": 4}, step_size=0.3, padding_mode="zeros"),
    "preconditioned": ModelConfig("preconditioned", DENOISER, averaging=0.8, solver={"kind": "Picard", "tol": 0.1}),
    "filtered": ModelConfig(
        "filtered",
        {"kind": "UNet", "features": [4, 8], "blocks": [1, 2]},
        kernel_size=7,
        solver={"kind": "Anderson", "tol": 0.1, "memory": 3},
    ),
    "universal": ModelConfig(
        "universal",
        {"kind": "UNet", "features": [4, 8], "blocks": [1, 1], "conditions": 3, "injection": 13},
        kernel_size=None,
        padding_mode="valid",
        sigma_range=[0.3, 5.0],
        noise_range=[0.0, 0.2],
    ),
    "plug-and-play": ModelConfig(
        "plug-and-play", {"kind": "GaussianDenoiser", "features": [4, 8], "blocks": [1, 1]}, noise_range=[0.0, 0.3]
    ),
    "feed-forward": ModelConfig("feed-forward", DENOISER, weight=0.01),
    "denoiser": ModelConfig("denoiser", DENOISER),
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_rebuilds_the_network(tmp_path, form, half):
    config = CONFIGS[form]
    model = config.model().eval()
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, config, half=half)
    found, read = load_checkpoint(path)
    assert read == read_config(path) == config
    assert os.listdir(tmp_path) == ["model.safetensors"]
    if isinstance(model, DEGrad):
        assert (found.solver, found.averaging) == (model.solver, model.averaging)
    for name, value in found.state_dict().items():
        expected = model.state_dict()[name]
        rounded = expected.half().float() if half and expected.dim() > 1 else expected
        torch.testing.assert_close(value, rounded, rtol=0, atol=0)
    assert not found.training


def test_a_checkpoint_in_half_precision_is_half_as_large_or_refused(tmp_path):
    config = ModelConfig(denoiser={**DENOISER, "features": 32, "depth": 6})
    model = config.model()
    sizes = []
    for half in (False, True):
        save_checkpoint(tmp_path / "model", model, config, half=half)
        sizes.append((tmp_path / "model").stat().st_size)
    assert sizes[1] < 0.55 * sizes[0]
    model.regularizer.denoiser.layers[0].weight.data[0, 0, 0, 0] = 1e5
    with pytest.raises(ValueError, match=r"layers\.0\.weight with values that are not finite in torch.float16"):
        save_checkpoint(tmp_path / "model", model, config, half=True)


def test_a_foreign_or_broken_checkpoint_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_checkpoint(path, SMALL.model(), SMALL)
    whole = path.read_bytes()
    for broken in (whole[:-100], b"", whole[:-10] + b"0123456789", b"x" * 1000):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole checkpoint"):
            load_checkpoint(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"not a checkpoint of jfbfast .*foreign"):
        load_checkpoint(path)
    save_file({"w": torch.zeros(2)}, path, {"format": "jfbfast.DEGrad/1", "config": "{}"})
    with pytest.raises(CheckpointError, match=r"not a checkpoint of jfbfast .*its format is jfbfast\.DEGrad/1"):
        load_checkpoint(path)
    path.write_bytes(whole.replace(b"averaging", b"averagine"))
    with pytest.raises(CheckpointError, match="averagine"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "none")


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of shipped models: two for one setting, and two of other kinds."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr(pretrained, "WEIGHTS", folder)
    for name, config in (
        ("a-paper", CONFIGS["paper"]),
        ("b-filtered", SMALL),
        ("c-denoiser", CONFIGS["denoiser"]),
        ("d-seven", CONFIGS["filtered"]),
    ):
        save_checkpoint(folder / f"{name}.safetensors", config.model(), config)
    return folder


def test_shipped_models_load_by_name(shipped):
    model = DEGrad.from_pretrained("b-filtered")
    expected = load_checkpoint(shipped / "b-filtered.safetensors")[0].state_dict()
    assert not model.training and model.state_dict().keys() == expected.keys()
    with pytest.raises(
        CheckpointError,
        match=r"no such file; the published models are a-paper, b-filtered, c-denoiser, d-seven",
    ):
        DEGrad.from_pretrained("nothing")
    with pytest.raises(ValueError, match="a denoiser network; it takes a DE-GRAD"):
        DEGrad.from_pretrained("c-denoiser")
    with pytest.raises(ValueError, match="a filtered network; it takes a UniversalDEGrad"):
        UniversalDEGrad.from_pretrained("b-filtered")
    for file in (shipped / "d-seven.safetensors", str(shipped / "d-seven.safetensors")):
        assert DEGrad.from_pretrained(file).state_dict().keys() == load_checkpoint(file)[0].state_dict().keys()
    (shipped / "e-broken").write_text("broken")
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        DEGrad.from_pretrained(shipped / "e-broken")


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ((5, 1.0, 0.01, "reflect"), "b-filtered"),
        ((5, 1.0, 0.01, "zeros"), "a-paper"),
        ((5, 1.0, 0.01, "circular"), None),
        ((7, 1.0, 0.01, "reflect"), "d-seven"),
        ((5, 2.0, 0.01, "reflect"), None),
        ((5, 1.0, 0.02, "reflect"), None),
    ],
)
def test_a_shipped_model_is_chosen_by_blur_and_noise(shipped, setting, name):
    assert pretrained.matching_name(*setting) == name


def test_every_shipped_model_has_a_card_and_loads():
    for name in pretrained.pretrained_names():
        assert (pretrained.WEIGHTS / f"{name}.md").read_text(encoding="utf-8").strip()
    for name in pretrained.installed_names():
        load_checkpoint(pretrained.pretrained_file(name))


@pytest.mark.parametrize("form", ["paper", "preconditioned", "filtered", "feed-forward", "denoiser"])
def test_a_saved_directory_has_the_settings_that_commands_ask_for(tmp_path, form):
    network = {"kind": "DnCNN", "channels": 1, "features": 4, "depth": 3, "residual": form != "paper"}
    config = ModelConfig(form, network, kernel_size=7, sigma=1.5, noise=0.03, gradient={"kind": "neumann"})
    save_checkpoint(tmp_path / "model", config.model(), config)
    model, _ = pretrained.load_model(tmp_path / "model")
    model.save_pretrained(tmp_path / "saved")
    found, settings = pretrained.load_model(tmp_path / "saved")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.state_dict().items())
    names = ["form", "channels", "noise"]
    names += ["kernel_size", "sigma", "padding_mode"] if form != "denoiser" else []
    names += ["gradient"] if form not in ("denoiser", "feed-forward") else []
    for name in names:
        assert getattr(settings, name) == getattr(config, name)
    assert pretrained.network_name(tmp_path / "saved") == "saved"


def test_the_shipped_networks_have_the_same_settings_once_saved(tmp_path):
    for name in pretrained.pretrained_names():
        model, config = pretrained.load_model(name)
        model.save_pretrained(tmp_path / name)
        settings = pretrained.load_model(tmp_path / name)[1]
        for each in ("form", "channels", "noise", "padding_mode"):
            assert getattr(settings, each) == getattr(config, each)
        assert list(settings.noise_range or ()) == list(config.noise_range or ())


def test_a_saved_model_that_no_command_takes_is_refused_clearly(tmp_path):
    network = DnCNN(1, 4, 3, residual=True)
    blur = jfbfast.GaussianBlur()
    weights = jfbfast.data_fidelity.WeightedLeastSquares(torch.ones(1, 1, 1, 1))
    models = {
        "it is a DEProx; they take a DEGrad": jfbfast.DEProx(blur, network),
        "its data_fidelity is a WeightedLeastSquares": DEGrad(blur, RED(network), data_fidelity=weights),
        "its blur is a Blur; they take a GaussianBlur": DEGrad(jfbfast.Blur(torch.ones(3, 3) / 9), RED(network)),
        r"its blur is a GaussianBlur; .* one σ": DEGrad(jfbfast.GaussianBlur(None, (1.0, 2.0)), RED(network)),
    }
    for told, model in models.items():
        model.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=f"the commands do not take this model .*{told}"):
            pretrained.load_model(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"it has neither config\.json nor model\.safetensors"):
        pretrained.load_model(tmp_path / "empty")
