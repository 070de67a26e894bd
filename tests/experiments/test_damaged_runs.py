"""Run directories and settings that are damaged or hostile: one sentence, and no traceback."""

import io

import pytest
import torch

from helpers import small_runs
from helpers.command_line import run
from helpers.small_runs import write_photographs
from jfbfast.experiments.settings import make_settings, read_settings
from jfbfast.models.checkpoint import CheckpointError, save_checkpoint
from jfbfast.models.config import ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")
DENOISER = {"kind": "DnCNN", "features": 2, "depth": 2, "norm": None, "spectral_norm": False, "residual": True}
SMALL = ModelConfig(denoiser=DENOISER)
TINY = {
    "features": 4,
    "depth": 3,
    "crop": 16,
    "batch_size": 2,
    "validation": 1,
    "pretraining_steps": 2,
    "steps": 2,
    "interval": 1,
    "logger": "csv",
}


def one_sentence(error):
    return "\n" not in str(error) and len(str(error)) < 500


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A complete run without its last file, and another one with another architecture."""
    folder = write_photographs(tmp_path_factory.mktemp("runs") / "photographs", 4)
    found = []
    for name, values in (("one", {}), ("other", {"depth": 4})):
        small_runs.train(folder, folder.parent / name, **TINY | values)
        (folder.parent / name / "model.safetensors").unlink()
        found.append(folder.parent / name)
    return found


def resume(directory):
    small_runs.Run({}, directory, resume=True, progress=False).train(small_runs.Console(quiet=True))


@pytest.mark.parametrize(
    "name", ["config.yaml", "photographs.json", "metrics.csv", "training.ckpt", "pretrained.safetensors"]
)
def test_a_damaged_run_directory_gives_one_sentence(runs, name):
    file = runs[0] / name
    whole = file.read_bytes()
    contents = [b"", b"text\n", b"\0" * 500, "a".encode("utf-16"), b"{}", b"[]", b"[" * 10**5, b"9" * 5000]
    contents += [whole[: len(whole) // 2]] if name != "metrics.csv" else []  # whose last line a kill may cut off
    contents += [(runs[1] / name).read_bytes()] if name not in ("metrics.csv", "photographs.json") else []
    try:
        for content in contents:
            file.write_bytes(content)
            with pytest.raises(ValueError) as error:
                resume(runs[0])
            assert one_sentence(error.value), error.value
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("config.yaml", "\nsteps: 2", "\nsteps: many", r"config\.yaml: steps is 'many'; it takes an integer"),
        ("config.yaml", "seed: 0", "seed: 1", r"training\.ckpt: belongs to another run: its seed is 0; here it is 1"),
        ("photographs.json", '"3.png"', "3", r"photographs\.json: .*validation is no list of names"),
        ("metrics.csv", "training,1,", "training,x,", r"metrics\.csv: not the metrics of a run"),
        ("metrics.csv", "training,1,", "training,1,,", r"metrics\.csv: not the metrics of a run"),
    ],
)
def test_a_wrong_value_in_a_run_directory_is_named(runs, name, old, new, message):
    file = runs[0] / name
    whole = file.read_text(encoding="utf-8")
    try:
        assert old in whole
        file.write_text(whole.replace(old, new), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            resume(runs[0])
    finally:
        file.write_text(whole, encoding="utf-8")


def test_a_changed_run_checkpoint_is_refused(runs):
    file = runs[0] / "training.ckpt"
    whole = file.read_bytes()

    try:
        for values, message in (
            ({"global_step": 10**9}, "global_step is 1000000000; it takes an integer from 0 to 2"),
            ({"state_dict": {}}, "its network has a tensor"),
            ({"optimizer_states": "x"}, "not a whole checkpoint of a run"),
        ):
            torch.save(torch.load(io.BytesIO(whole), weights_only=True) | values, file)
            with pytest.raises(CheckpointError, match=message):
                resume(runs[0])
        file.write_bytes((runs[0] / "pretraining.ckpt").read_bytes())
        with pytest.raises(CheckpointError, match="belongs to another run: its phase is 'pretraining'"):
            resume(runs[0])
    finally:
        file.write_bytes(whole)
    resume(runs[0])


def test_evaluate_names_a_damaged_file_beside_a_network(tmp_path):
    folder = write_photographs(tmp_path / "photographs", 4, (4, 4), (20, 20))
    config = ModelConfig(denoiser=DENOISER)
    save_checkpoint(tmp_path / "model", config.model(), config)
    evaluate = ("evaluate", tmp_path / "model", folder, "--methods", "blurred")
    (tmp_path / "config.yaml").write_text("of: something else")
    assert run(*evaluate).exit_code == 0
    (tmp_path / "photographs.json").write_text("{}")
    assert "config.yaml: of is no setting" in run(*evaluate).stderr
    (tmp_path / "config.yaml").write_text(f"data: {folder}")
    result = run(*evaluate)
    assert result.exit_code == 1 and "photographs.json: not the names of a run's photographs" in result.stderr


BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "line 2 has a reference; settings take none"),
        ("steps: 1\nsteps: 2\n", "'steps' is there twice"),
        ("steps:\t1\n\tdata: x\n", "not a file of settings"),
        ("data: 2020-13-45\n", "month must be in 1..12"),
        ("data: !!timestamp x\n", "not a file of settings"),
        ("data: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("? [1]\n: 2\n", "not a file of settings"),
        ("[" * 10**5, "recursion"),
        ("x" * 2**21, "longer than 1048576 characters"),
        ("data: " + "9" * 5000, "not a file of settings"),
        ("data: 2020-01-02", "data is datetime.*; it takes text"),
        ("data: [a]", "it takes text"),
        ("data: ''", "data is ''; it takes a path"),
        ('data: "a\\0b"', "it takes a path"),
        ("data: d\nsteps: 1.0e+308", "steps is 1[0-9]*; it takes 1000000000 at most"),
        ("data: d\nsteps: .inf", "it takes an integer"),
        ("data: d\nsteps: null", "it takes an integer"),
        ("data: d\nseed: 99999999999", "seed is 99999999999; it takes 4294967295 at most"),
        ("data: d\nworkers: 100000", "it takes 256 at most"),
        ("data: d\nfeatures: [[4]]", "features is .*; it takes an integer"),
        ("data: d\nfeatures: 100000", "features of denoiser is 100000; it takes an integer from 1 to 4096"),
        ("data: d\nsolver: Anderson:memory=1000000", "memory of solver is 1000000"),
        ("data: d\nsigma: 1.0e-300", "sigma is 1e-300; it takes a number from 0.001"),
        ("1: 2", "1 is no setting"),
    ],
)
def test_invalid_settings_are_named(tmp_path, text, message):
    file = tmp_path / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        make_settings(read_settings(file)).model_config()
    assert "\n" not in str(error.value)
