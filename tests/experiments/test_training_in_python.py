"""`jfbfast.train`: a directory or any torch dataset, as reproducible and resumable as the command."""

import signal

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.utils.data import IterableDataset, Subset, TensorDataset
from torchvision.datasets import FakeData
from torchvision.transforms import v2

import jfbfast
from helpers import small_runs
from helpers.command_line import run
from helpers.small_runs import assert_same, rows, write_photographs
from jfbfast.experiments.callbacks import Metrics
from jfbfast.experiments.processes import Interrupted
from jfbfast.experiments.runs import Run
from jfbfast.imaging.photographs import ImageError

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {**small_runs.TINY, "pretraining_steps": 2, "steps": 4, "interval": 2}
AUGMENTED = v2.Compose([v2.RandomCrop(20), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.RandomRotation(5)])


def train(data, out, **values):
    return jfbfast.train(data, out, progress=False, **{**TINY, **values})


def test_torchvision_s_datasets_train_reproducibly(tmp_path):
    torch.manual_seed(0)
    model = train(FakeData(6, (3, 24, 26), transform=AUGMENTED), tmp_path / "a", validation=2)
    torch.manual_seed(1)
    train(FakeData(6, (3, 24, 26), transform=AUGMENTED), tmp_path / "b", validation=2, workers=1)
    assert_same(tmp_path / "a", tmp_path / "b")
    assert isinstance(model, jfbfast.DEGrad) and not model.training
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 3, 16, 16)
    assert len([row for row in rows(tmp_path / "a") if row["val_psnr"]]) == 3


def test_a_dataset_trains_like_the_same_photographs(tmp_path):
    """In bytes, in floats on [0, 1] and on [−1, 1], as PIL images and as files."""
    folder = write_photographs(tmp_path / "photographs", 5)
    pictures = [Image.open(file) for file in sorted(folder.iterdir())]
    arrays = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    train(folder, tmp_path / "files")
    train(pictures, tmp_path / "pictures")
    train(TensorDataset(arrays, torch.arange(5)), tmp_path / "bytes")
    for name in ("pictures", "bytes"):
        assert_same(tmp_path / "files", tmp_path / name)
    train(Subset(arrays / 255, range(4)), tmp_path / "unit", validation=arrays[4:] / 255)
    train(TensorDataset(arrays / 127.5 - 1), tmp_path / "signed", value_range=(-1, 1))
    for name in ("unit", "signed"):
        for mine, theirs in zip(rows(tmp_path / name), rows(tmp_path / "files"), strict=True):
            numbers = [name for name in mine if mine[name] and name not in ("phase", "val_evaluations", "evaluations")]
            for number in numbers:
                assert float(mine[number]) == pytest.approx(float(theirs[number]), rel=1e-3)


@pytest.mark.parametrize(("channels", "form"), [(1, "filtered"), (4, "feed-forward"), (2, "universal")])
def test_images_of_any_number_of_channels_train(tmp_path, channels, form):
    values = {"form": form, "channels": channels}
    if form == "universal":
        unet = {"denoiser": "UNet", "features": (4,), "blocks": (1,), "depth": 17, "sigma_range": (0.5, 0.7)}
        values |= {**unet, "pretraining_steps": 0, "measurements": 1}
    model = train(TensorDataset(torch.rand(4, channels, 18, 17).double()), tmp_path / "out", **values)
    assert model(torch.zeros(1, channels, 16, 16)).shape[1] == channels


def test_a_run_on_a_dataset_resumes_like_an_uninterrupted_one(tmp_path, monkeypatch):
    data, out = FakeData(6, (3, 24, 26), transform=AUGMENTED), tmp_path / "out"
    train(data, tmp_path / "whole")
    genuine = Metrics.on_train_batch_end

    def interrupting(self, trainer, *arguments):
        genuine(self, trainer, *arguments)
        if (self.phase, trainer.global_step) == ("training", 3):
            monkeypatch.setattr(Metrics, "on_train_batch_end", genuine)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Metrics, "on_train_batch_end", interrupting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        told = r"step 3 of training is saved; go on with: jfbfast\.train\(dataset, '.*out', resume=True\)"
        with pytest.raises(KeyboardInterrupt, match=told) as raised:
            train(data, out)
    finally:
        signal.signal(signal.SIGINT, before)
    assert isinstance(raised.value.__cause__, Interrupted)
    jfbfast.train(data, out, resume=True, progress=False)  # with the settings of the run
    assert_same(tmp_path / "whole", out)
    result = run("train", "--out", out, "--resume")
    assert result.exit_code == 1 and "trains on a dataset that was given in Python; go on there with: " in result.stderr
    for other in (FakeData(7, (3, 24, 26), transform=AUGMENTED), FakeData(6, (3, 24, 26), random_offset=9)):
        told = (
            r"its images for training are not those of the run in .*: now it is FakeData: \d images .*; at the start it"
        )
        with pytest.raises(ValueError, match=told):
            train(other, out, resume=True)
    with pytest.raises(ValueError, match=r"images on \[-1, 1\], .*; at the start it was .* on \[0, 1\]"):
        train(data, out, resume=True, value_range=(-1, 1))


def test_wrong_data_is_named(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    images = torch.rand(4, 3, 20, 20)
    for data, values, message in (
        (Stream(), {}, r"data is a Stream; it takes a dataset with len\(\) and \[index\]"),
        (images, {"validation": Stream()}, "validation is a Stream"),
        (tmp_path, {"validation": images}, "validation is a dataset; with a directory of photographs it takes a share"),
        (tmp_path, {"value_range": (-1, 1)}, r"value_range is \(-1, 1\); with a directory"),
        (images, {"value_range": (1, 1)}, r"value_range is \(1, 1\); it takes two numbers"),
        (images, {"train": 0}, "train and validation leave no image of the dataset"),
        (2 * images - 1, {}, r"image 0 of the dataset: its floats go from -.* it takes a range of \[0, 1\]"),
        (images, {"channels": 4}, "image 0 of the dataset: has 3 channels"),
        (images, {"crop": 64}, "image 0 of the dataset: too small for crops of 64 pixels: 20 × 20"),
        (images, {"nonsense": 1}, "nonsense is no setting"),
    ):
        with pytest.raises(ValueError, match=message):
            train(data, tmp_path / "out", **values)
        assert not (tmp_path / "out").exists()
    late = [*images, torch.full((3, 20, 20), torch.nan)]
    with pytest.raises(ImageError, match="image 4 of the dataset: 1200 of its values are not finite"):
        train(late, tmp_path / "out", validation=0, steps=20)


def test_the_command_trains_and_scores_grey_and_many_channels(tmp_path):
    bands = tmp_path / "bands"
    bands.mkdir()
    for i in range(5):
        np.save(bands / f"{i}.npy", np.random.default_rng(i).random((4, 20, 22), np.float32))
    colours = write_photographs(tmp_path / "photographs", 5)
    Image.open(colours / "1.png").convert("L").save(colours / "1.png")
    values = small_runs.flags({**TINY, "form": "feed-forward"})
    for folder, channels in ((bands, 4), (colours, 1)):
        out = tmp_path / f"out{channels}"
        result = run("train", folder, "--out", out, f"--channels={channels}", *values)
        assert result.exit_code == 0 and "4 photographs to train on, 1 to validate on" in result.output
        methods = ["--methods=blurred,tikhonov", "--validation=2"]
        result = run("evaluate", out / "model.safetensors", folder, "--train=1", *methods)
        assert result.exit_code == 0 and "2 images; blur 5 × 5" in result.output
    both = [tmp_path / f"out{channels}" / "model.safetensors" for channels in (4, 1)]
    result = run("evaluate", *both, colours)
    assert result.exit_code == 1 and "different numbers of channels (out4 of 4 and out1 of 1)" in result.output
    result = run("train", bands, "--out", tmp_path / "out3", *values)
    assert result.exit_code == 1 and "0.npy: has 4 channels" in result.output
    assert not (tmp_path / "out3").exists()


def test_a_run_names_its_dataset_in_its_settings(tmp_path):
    train(torch.rand(3, 3, 18, 18), tmp_path / "out", form="feed-forward", validation=1)
    assert "data: dataset Tensor" in (tmp_path / "out" / "config.yaml").read_text()
    names = (tmp_path / "out" / "photographs.json").read_text()
    assert "Tensor: 2 images on [0, 1], the first of shape (3, 18, 18) and hash" in names
    with pytest.raises(ValueError, match="holds no run to resume"):
        Run({"data": "d"}, tmp_path / "none", resume=True).train(Console(quiet=True))
