"""A training run in a directory of its own: settings, metrics, checkpoints to resume from, and the trained network.

``config.yaml`` holds the resolved settings, ``photographs.json`` the names of those it trains and validates on,
``metrics.csv`` a row every few steps, ``pretraining.ckpt`` and ``training.ckpt`` the state of each phase after its
last interval, ``model.safetensors`` the result.
"""

from __future__ import annotations

import csv
import json
import os
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch import Tensor, nn

from jfbfast.backends import ONEDNN_HAS_BFLOAT16
from jfbfast.checkpoint import CheckpointError, ModelConfig, load_checkpoint, save_checkpoint
from jfbfast.conditional import ConditionalDEGrad
from jfbfast.conditional_training import ConditionalDeblurTask
from jfbfast.data import image_files
from jfbfast.datasets import Images, RandomCrops, least_side, split, usable_photographs
from jfbfast.degrad import DEGrad
from jfbfast.denoisers import RED
from jfbfast.files import write_whole
from jfbfast.pretrained import load_model
from jfbfast.settings import changed_settings, make_settings, read_settings, write_settings
from jfbfast.training import DeblurTask, DenoiserTask, JacobianPenalty, MovingAverage, Optimization, fit
from jfbfast.unet import UNet

METRICS = ("loss", "psnr", "evaluations", "diverged", "jacobian_penalty")
VALIDATION = ("val_loss", "val_psnr", "val_evaluations", "val_diverged")
_COLUMNS = ("phase", "step", "seconds", *METRICS, *VALIDATION)


def _first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


class _CheckpointFiles(TorchCheckpointIO):
    """Run checkpoints as files that are whole or absent, and that are read as plain tensors and numbers."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        write_whole(Path(path), lambda partial: torch.save({**checkpoint, "jfbfast": "run/1"}, partial))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        try:
            with zipfile.ZipFile(path) as archive:  # torch reads past a wrong checksum
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"{damaged} has another checksum")
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a broken pickle raises nearly anything
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path}: not a whole checkpoint of a run ({told})") from error
        if not isinstance(checkpoint, dict) or checkpoint.get("jfbfast") != "run/1":
            raise CheckpointError(f"{path}: not a checkpoint of a run of jfbfast")
        return checkpoint


class Metrics(Callback):
    """A row of ``metrics.csv`` every few steps, and after each validation; the trainer's loggers get the same.

    A row's step is the number of steps done in the phase, its seconds those of fitting since the run began, all
    phases and validations together. ``loss`` and ``psnr`` are of one batch, the latter of its mean squared error;
    ``val_loss`` and ``val_psnr`` are means over the validation's images. Rows of steps that a resumed run repeats are
    dropped first, their time too.

    Args:
        path: of the file.
        phase: the first column.
        step: the step the run goes on from.
        every: steps between two rows.
    """

    def __init__(self, path: Path, phase: str, step: int, every: int) -> None:
        self.path, self.phase, self.every = path, phase, every
        self.seconds, self.start = 0.0, time.perf_counter()
        if _first_process():
            self._begin(step)

    def _begin(self, step: int) -> None:
        rows: list[dict[str, str]] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                whole = [line for line in file if line.endswith("\n")]  # a kill can cut the last one off
            rows = [r for r in csv.DictReader(whole) if r["phase"] != self.phase or int(r["step"] or 0) <= step]
        if rows:
            self.seconds = float(rows[-1].get("seconds") or "nan")

        def write(partial: Path) -> None:
            with partial.open("w", newline="") as file:
                writer = csv.DictWriter(file, _COLUMNS)
                writer.writeheader()
                writer.writerows(rows)

        write_whole(self.path, write)

    def _report(self, trainer: L.Trainer, names: Sequence[str]) -> None:
        if not trainer.is_global_zero:
            return
        found = {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
        for logger in trainer.loggers:
            logger.log_metrics(found, trainer.global_step)
        row = {name: f"{value:.9g}" for name, value in found.items()}
        row["seconds"] = f"{self.seconds + time.perf_counter() - self.start:.3f}"
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, _COLUMNS).writerow({"phase": self.phase, "step": trainer.global_step, **row})

    def on_train_start(self, *args: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            self._report(trainer, METRICS)

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._report(trainer, VALIDATION)


class _Residual(nn.Module):
    """y − R(y): what the paper's R removes at an image, as a denoiser."""

    def __init__(self, regularizer: nn.Module) -> None:
        super().__init__()
        self.regularizer = regularizer

    def forward(self, y: Tensor) -> Tensor:
        out: Tensor = y - self.regularizer(y)
        return out


def denoiser_of(model: nn.Module) -> nn.Module:
    """The denoiser that a network of ours is built on."""
    if isinstance(model, DEGrad):
        regularizer: nn.Module = model.regularizer
        return regularizer.denoiser if isinstance(regularizer, RED) else _Residual(regularizer)
    inner = getattr(model, "denoiser", model)
    assert isinstance(inner, nn.Module)
    return inner


def _take_weights(model: nn.Module, source: nn.Module) -> None:
    """Copy the weights of the same network, or of one whose UNet is told less: no injection, or one setting alone."""
    weights, inner, given = source.state_dict(), denoiser_of(model), denoiser_of(source)
    if isinstance(inner, UNet) and isinstance(given, UNet):
        head = next(name for name in weights if name.endswith("head.weight"))
        weights[head] = inner.widened_head(given)
    if isinstance(model, ConditionalDEGrad) and not isinstance(source, ConditionalDEGrad):
        weights["regularizer.log_filter_damping"] = weights["regularizer.log_weight"]
        weights = model.state_dict() | weights
    model.load_state_dict(weights)


def _start_from(model: nn.Module, config: ModelConfig, path: str, console: Console) -> None:
    """Copy the weights of a shipped network or a file: one of the same form, or its denoiser."""
    source, found = load_model(path)
    alone = found.form == "denoiser"
    try:
        if not alone and found.form != config.form:
            raise RuntimeError(f"its form is {found.form}")
        _take_weights(denoiser_of(model) if alone else model, source)
    except RuntimeError as error:
        raise ValueError(
            f"init is {path}, a {found.form} network with {dict(found.denoiser)}; this run takes a {config.form} "
            f"network or a denoiser, with {dict(config.denoiser)}"
        ) from error
    new = ", ".join(name for name in config.denoiser if name not in found.denoiser)
    console.print(f"Starting from {path}" + (f", whose denoiser has no {new}." if new else "."), highlight=False)


class Run:
    """A run of `jfbfast train` in a directory.

    Args:
        values: settings by name, of those that were chosen.
        out: the directory.
        resume: go on with the run that is there, from its last checkpoints.
        progress: show bars.

    Raises:
        ValueError: settings that are not valid; a directory that holds a run, without ``resume``, or
            holds none with it; a setting that a resumed run may not change.
    """

    def __init__(self, values: Mapping[str, Any], out: Path, *, resume: bool = False, progress: bool = True) -> None:
        file = out / "config.yaml"
        if out.exists() and not out.is_dir():
            raise ValueError(f"out is the file {out}; it takes a directory")
        if file.exists() and not resume and _first_process():
            raise ValueError(f"{out} holds a run already; choose another directory, or resume it")
        if resume:
            if not file.exists():
                raise ValueError(f"{out} holds no run to resume")
            old = make_settings(read_settings(file))
            self.settings = make_settings({**read_settings(file), **values}).resolved()
            if changed := changed_settings(old, self.settings):
                name = changed[0]
                raise ValueError(
                    f"{name} is {getattr(self.settings, name)}; the run in {out} was started with {getattr(old, name)}"
                )
        else:
            self.settings = make_settings(values).resolved()
        self.settings = replace(self.settings, data=str(Path(self.settings.data).resolve()))  # from wherever it resumes
        self.out, self.resume, self.progress = out, resume, progress
        self.config = self.settings.model_config()
        self.photographs: dict[str, list[str]] = {}

    def _data(self, console: Console) -> tuple[RandomCrops, Images | None]:
        settings = self.settings
        kept, held_out, _ = split(image_files(settings.data), settings.train, settings.validation)
        if not kept:
            raise ValueError(f"train and validation leave no photograph of {settings.data} to train on")
        say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
        usable = partial(
            usable_photographs,
            say=say,
            resize=settings.resize,
            squash=settings.squash,
            cache=int(settings.cache * 2**30),
            least=1 if settings.resize else max(least_side(settings.crop), self.config.kernel_size // 2 + 1),
            purpose=f"crops of {settings.crop} pixels",
        )
        photographs, validation = usable(kept), usable(held_out, needed=False)
        self._check_photographs(photographs.files, validation.files)
        say(f"{len(photographs)} photographs to train on, {len(validation)} to validate on.")
        if not photographs.cached:
            say(f"They take more than {settings.cache:g} GiB decoded, and are decoded at each use.")
        length = settings.batch_size * max(settings.steps, settings.pretraining_steps or 0)
        crops = RandomCrops(photographs, settings.crop, length, settings.flips, settings.seed)
        if not validation:
            return crops, None
        return crops, Images(validation, settings.resize or settings.crop, settings.seed)

    def _check_photographs(self, kept: Sequence[Path], held_out: Sequence[Path]) -> None:
        """Keep the names, relative to the directory; a run that goes on takes those that it was started with."""
        data, file = self.settings.data, self.out / "photographs.json"
        self.photographs = {
            name: [path.relative_to(data).as_posix() for path in files]
            for name, files in (("training", kept), ("validation", held_out))
        }
        if not (self.resume and file.exists()):  # a run of before there was that file has none
            return
        started: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
        for name, names in self.photographs.items():
            if names != started[name]:
                other = sorted(set(names).symmetric_difference(started[name]))
                raise ValueError(
                    f"data is {data}, whose photographs for {name} are not those that the run in {self.out} was "
                    f"started with: {len(other)} differ, such as {other[0]}"
                )

    def _contraction(self) -> JacobianPenalty | None:
        weight, settings = self.settings.jacobian_penalty, self.settings
        if not weight:
            return None
        return JacobianPenalty(weight, settings.jacobian_bound, settings.jacobian_interval, settings.jacobian_samples)

    def _optimization(self, rate: float) -> Optimization:
        return Optimization(rate, self.settings.schedule, self.settings.warmup, self.settings.beta2)

    def _fit(
        self,
        phase: str,
        task: DeblurTask | DenoiserTask,
        train: RandomCrops,
        val: Images | None,
        steps: int,
        more: Sequence[Callback] = (),
    ) -> L.Trainer:
        settings, file = self.settings, self.out / f"{phase}.ckpt"
        step = 0
        if file.exists():
            step = int(_CheckpointFiles().load_checkpoint(file)["global_step"])
        callbacks: list[Callback] = [
            Metrics(self.out / "metrics.csv", phase, step, settings.log_every),
            ModelCheckpoint(
                self.out, phase, every_n_epochs=1, save_on_train_epoch_end=True, enable_version_counter=False
            ),
            *more,
        ]
        if settings.ema:
            callbacks.append(MovingAverage(settings.ema))
        return fit(
            task,
            train,
            steps=steps,
            batch_size=settings.batch_size,
            val=val,
            interval=settings.interval,
            precision=settings.precision,
            clip=settings.clip,
            workers=settings.workers,
            progress=self.progress,
            resume=str(file) if file.exists() else None,
            callbacks=callbacks,
            logger=TensorBoardLogger(self.out, "tensorboard", phase) if settings.tensorboard else False,
            enable_checkpointing=True,
            plugins=[_CheckpointFiles()],
        )

    def train(self, console: Console) -> float | None:
        """Train, or go on training, up to ``model.safetensors``; the last validation's PSNR at the true range, in dB.

        Raises:
            CheckpointError: a checkpoint of the run, or the one to start from, is not whole.
            ImageError: a photograph that cannot be used.
            ValueError: a split without photographs to train on, or other ones than a resumed run was started with; a
                setting that the network does not take.
        """
        settings, config = self.settings, self.config
        L.seed_everything(settings.seed, verbose=False)
        if settings.precision == "bf16" and not torch.accelerator.is_available() and not ONEDNN_HAS_BFLOAT16:
            console.print("This CPU has no bfloat16 convolutions in oneDNN: --precision 32 is several times faster.")
        model = config.model()
        alone = config.form == "denoiser"
        steps, runner = settings.pretraining_steps or 0, None
        pretrained, phase = self.out / "pretrained.safetensors", self.out / "training.ckpt"
        whole = (pretrained, phase, *((self.out / "pretraining.ckpt",) if alone else ()))  # which hold every weight
        if settings.init is not None and not any(file.exists() for file in whole):
            _start_from(model, config, settings.init, console)
        crops, val = self._data(console)
        self._claim()
        if pretrained.exists():
            model.load_state_dict(load_checkpoint(pretrained)[0].state_dict())
        elif steps and not phase.exists():
            console.print(f"Pretraining the denoiser: {steps} steps.", highlight=False)
            low, high = settings.pretraining_noise
            task = DenoiserTask(
                denoiser_of(model), (low, high), self._optimization(settings.pretraining_rate), settings.seed
            )
            runner = self._fit("pretraining", task, crops, val, steps)
            self._save(pretrained, model, config)
        if not alone:
            console.print(f"Training the {config.form} network: {settings.steps} steps.", highlight=False)
            in_training: dict[str, Any] = {}
            if isinstance(model, DEGrad):
                assert settings.training_tol is not None and settings.training_max_iter is not None
                solver = replace(model.solver, tol=settings.training_tol, max_iter=settings.training_max_iter)
                dtype = None if settings.solve_dtype == "float32" else getattr(torch, settings.solve_dtype)
                in_training = {"solver": solver, "solve_dtype": dtype}
            options = self._optimization(settings.learning_rate), settings.seed, in_training, self._contraction()
            deblur = (
                ConditionalDeblurTask(model, *options, settings.measurements)
                if isinstance(model, ConditionalDEGrad)
                else DeblurTask(model, config.blur(), config.noise, *options)
            )
            runner = self._fit("training", deblur, crops, val, settings.steps)
        self._save(self.out / "model.safetensors", model, config, settings.half)
        quality = None if runner is None else runner.callback_metrics.get("val_psnr")
        return None if quality is None else float(quality)

    @rank_zero_only
    def _claim(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_settings(self.out / "config.yaml", self.settings)
        text = json.dumps(self.photographs, indent=1)  # in ASCII, which names that are not UTF-8 have escapes in
        write_whole(self.out / "photographs.json", lambda partial: partial.write_text(text, encoding="utf-8"))

    @rank_zero_only
    def _save(self, path: Path, model: nn.Module, config: ModelConfig, half: bool = False) -> None:
        save_checkpoint(path, model, config, half=half)
