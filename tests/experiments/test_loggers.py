"""Where a run's metrics go: Lightning's loggers, whose packages need not be installed."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from lightning.pytorch import loggers
from lightning.pytorch.loggers import CSVLogger

from helpers import small_runs
from helpers.small_runs import rows, write_photographs
from jfbfast.experiments import loggers as run_loggers
from jfbfast.experiments.settings import read_run_settings

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {**small_runs.TINY, "pretraining_steps": 2, "steps": 2, "interval": 1, "schedule": "constant"}


@pytest.fixture
def folder(tmp_path):
    return write_photographs(tmp_path / "photographs", 3)


def train(folder, out, resume=False, **values):
    return small_runs.train(folder, out, resume, **{**TINY, **values})


class Fake(CSVLogger):
    """A logger of which the package is not installed: it keeps what it is told, by its number."""

    kept: dict = {}  # noqa: RUF012  # shared by all
    finished = 0

    def __init__(self, name, directory, number, **options):
        super().__init__(directory / "fake")
        self.number, self.options, self.told = number or f"number {len(self.kept)}", {"name": name, **options}, name
        self.kept.setdefault(self.number, {"options": self.options, "settings": [], "metrics": []})

    @property
    def version(self):
        return self.number

    def log_hyperparams(self, params=None):
        self.kept[self.number]["settings"].append(params)

    def log_metrics(self, metrics, step=None):
        self.kept[self.number]["metrics"].append((step, metrics))

    @property
    def experiment(self):
        return self

    def finish(self):
        type(self).finished += 1

    def save(self):
        pass


@pytest.fixture
def wandb(monkeypatch):
    """Lightning's WandbLogger as a fake, and a package of that name."""
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(Fake, "kept", {})
    monkeypatch.setattr(Fake, "finished", 0)
    monkeypatch.setattr(loggers, "WandbLogger", Fake)
    return Fake


def test_a_logger_gets_the_settings_and_the_metrics_of_each_phase(folder, tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "blurs")
    out = tmp_path / "out"
    train(folder, out, logger="wandb")
    first, second = wandb.kept.values()
    assert first["options"] == {"name": "out-pretraining", "project": "blurs", "group": "out"}
    assert second["options"]["name"] == "out-training" and wandb.finished == 2
    assert first["settings"][0]["steps"] == 2 and first["settings"][0]["learning_rate"] == 3e-4
    for logged, phase in ((first, "pretraining"), (second, "training")):
        written = [row for row in rows(out) if row["phase"] == phase]
        assert [step for step, _ in logged["metrics"]] == [int(row["step"]) for row in written]
        for (_, values), row in zip(logged["metrics"], written, strict=True):
            found = {name: float(value) for name, value in row.items() if value and name not in ("phase", "step")}
            assert found == pytest.approx(values)


def test_a_resumed_run_goes_on_in_the_same_run_of_its_logger(folder, tmp_path, wandb):
    out = tmp_path / "out"
    train(folder, out, logger="wandb")
    train(folder, out, resume=True, steps=4, logger="wandb")
    assert len(wandb.kept) == 2
    training = wandb.kept["number 1"]
    assert [step for step, _ in training["metrics"]] == [1, 1, 2, 2, 3, 3, 4, 4] and len(training["settings"]) == 1
    assert json.loads((out / "logger.json").read_text()) == {
        "wandb pretraining": "number 0",
        "wandb training": "number 1",
    }
    (out / "logger.json").write_text("[]")
    with pytest.raises(ValueError, match=r"logger\.json: not the numbers of a run's loggers"):
        train(folder, out, resume=True, steps=5, logger="wandb")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_named_before_the_training(folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr(run_loggers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"logger is {name}; its package is not installed: pip install {name}"):
        train(folder, tmp_path / "out", logger=name)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="logger is 'paper'; it takes one of tensorboard, wandb, mlflow, csv"):
        train(folder, tmp_path / "out", logger="paper")


def test_mlflow_gets_the_server_and_the_experiment_of_the_user(tmp_path, monkeypatch):
    made = []
    module = ModuleType("mlflow")
    module.get_tracking_uri = lambda: "http://server"
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setattr(loggers, "MLFlowLogger", lambda *args, **options: made.append((*args, options["run_id"])))
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    run_loggers._make("mlflow", tmp_path / "run", "training", "7")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "blurs")
    run_loggers._make("mlflow", tmp_path / "run", "training", None)
    assert made == [
        ("jfbfast", "run-training", "http://server", "7"),
        ("blurs", "run-training", "http://server", None),
    ]


def test_settings_of_older_runs_choose_a_logger_too(folder, tmp_path):
    out = tmp_path / "out"
    train(folder, out)
    text = (out / "config.yaml").read_text()
    for old, new in (("tensorboard: false", "csv"), ("tensorboard: true", "tensorboard")):
        (out / "config.yaml").write_text(text.replace("logger: csv", old))
        assert read_run_settings(out / "config.yaml").logger == new
