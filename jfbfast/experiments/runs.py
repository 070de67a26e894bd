"""A training run in a directory of its own: settings, metrics, checkpoints to resume from, and the trained network.

``config.yaml`` holds the resolved settings, ``photographs.json`` the names of those it trains and validates on,
``metrics.csv`` a row every few steps, ``pretraining.ckpt`` and ``training.ckpt`` the state of each phase after its
last interval or where a signal ended it, ``model.safetensors`` the result; who holds ``train.lock`` trains there.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor, nn

from jfbfast import checks
from jfbfast.backends.dispatch import ONEDNN_HAS_BFLOAT16
from jfbfast.experiments.conditional_training import ConditionalDeblurTask
from jfbfast.experiments.optimization import JacobianPenalty, Optimization
from jfbfast.experiments.processes import check_launch, rank
from jfbfast.experiments.run_callbacks import Checkpoints, Metrics, SoundSteps, TrainingError
from jfbfast.experiments.run_files import CheckpointFiles, locked
from jfbfast.experiments.settings import (
    CIRCUMSTANCES,
    changed_settings,
    make_settings,
    read_photographs,
    read_run_settings,
    read_settings,
    write_photographs,
    write_settings,
)
from jfbfast.experiments.stopping import Interrupted
from jfbfast.experiments.trainer import DeblurTask, DenoiserTask, MovingAverage, fit
from jfbfast.imaging.datasets import Images, RandomCrops, least_side, split, usable_photographs
from jfbfast.imaging.photographs import image_files
from jfbfast.models.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from jfbfast.models.conditional import ConditionalDEGrad
from jfbfast.models.config import ModelConfig
from jfbfast.models.degrad import DEGrad
from jfbfast.models.pretrained import load_model
from jfbfast.models.red import RED
from jfbfast.models.unet import UNet


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
    model.load_state_dict(dict(weights))  # without the record of A, which may be another here


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
        self.out, self.resume, self.progress = out, resume, progress
        if out.exists() and not out.is_dir():
            raise ValueError(f"out is the file {out}; it takes a directory")
        check_launch()
        if resume:
            if not file.exists():
                raise ValueError(f"{out} holds no run to resume")
            old = read_run_settings(file)
            self.settings = make_settings({**read_settings(file), **values}).resolved()
            if changed := changed_settings(old, self.settings):
                name = changed[0]
                raise ValueError(
                    f"{name} is {getattr(self.settings, name)}; the run in {out} was started with {getattr(old, name)}"
                )
        else:
            self._check_new()
            self.settings = make_settings(values).resolved()
        self.settings = replace(self.settings, data=str(Path(self.settings.data).resolve()))  # from wherever it resumes
        self.config = self.settings.model_config()
        self.photographs: dict[str, list[str]] = {}
        self.saved: tuple[str, int] | None = None  # the phase and the step that its files hold

    def _check_new(self) -> None:
        if not self.resume and rank() == 0 and (self.out / "config.yaml").exists():
            raise ValueError(f"{self.out} holds a run already; choose another directory, or resume it")

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
        started = read_photographs(file)
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
        chosen = {name: value for name, value in asdict(settings).items() if name not in CIRCUMSTANCES}
        files, resuming = CheckpointFiles(phase, chosen), file.exists()

        def saved(step: int) -> None:
            self.saved = phase, step

        step = 0
        if resuming:
            step = files.step(file, task, steps)
            saved(step)
        checkpoints = Checkpoints(file, saved)
        callbacks = [Metrics(self.out / "metrics.csv", phase, step, settings.log_every), SoundSteps(phase), *more]
        if settings.ema:
            callbacks.append(MovingAverage(settings.ema))
        try:
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
                resume=str(file) if resuming else None,
                callbacks=[*callbacks, checkpoints],
                logger=TensorBoardLogger(self.out, "tensorboard", phase) if settings.tensorboard else False,
                plugins=[files],
            )
        except TrainingError as error:
            raise TrainingError(f"{error}; {self._instead(phase)}") from error
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if resuming and not checkpoints.started:
                raise CheckpointError(f"{file}: not a whole checkpoint of a run ({checks.one_line(error)})") from error
            raise

    def _left(self) -> str:
        """What of the run its files hold, and how it goes on."""
        command = f"jfbfast train --out {shlex.quote(str(self.out))} --resume"
        if self.saved is None:
            return f"no step is saved yet; start with: {command}"
        phase, step = self.saved
        return f"step {step} of {phase} is saved; go on with: {command}"

    def _instead(self, phase: str) -> str:
        """What to change where a phase cannot go on."""
        settings, pretrained = self.settings, self.out / "pretrained.safetensors"
        saved = "no step is saved" if self.saved is None else f"{phase}.ckpt holds step {self.saved[1]}"
        training = phase == "training"
        changes = ["a lower " + ("--learning-rate" if training else "--pretraining-rate")]
        changes += ["--clip 1"] if not settings.clip else []
        changes += (
            ["--jacobian-penalty 1e-3"] if training and settings.implicit and not settings.jacobian_penalty else []
        )
        changes += ["--precision 32"] if settings.precision != "32" else []
        kept = f" (--init {pretrained} keeps the pretraining)" if training and pretrained.exists() else ""
        return f"{saved}; start another run with {' or '.join(changes)}{kept}"

    def train(self, console: Console) -> float | None:
        """Train, or go on training, up to ``model.safetensors``; the last validation's PSNR at the true range, in dB.

        Raises:
            CheckpointError: a checkpoint of the run, or the one to start from, is not whole, or is another run's.
            ImageError: a photograph that cannot be used.
            Interrupted: a signal asked for the end; the step before is saved.
            TrainingError: the loss or the gradient is not finite, or the latter is 0.
            OSError: a file that cannot be written, as on a full disk; those of before are whole.
            ValueError: a split without photographs to train on, or other ones than a resumed run was started with; a
                setting that the network does not take; another process trains in the directory.
        """
        settings, config = self.settings, self.config
        L.seed_everything(settings.seed, verbose=False)
        if settings.precision == "bf16" and not torch.accelerator.is_available() and not ONEDNN_HAS_BFLOAT16:
            console.print("This CPU has no bfloat16 convolutions in oneDNN: --precision 32 is several times faster.")
        model = config.model()
        whole = ["pretrained.safetensors", "training.ckpt"]  # which hold every weight
        whole += ["pretraining.ckpt"] if config.form == "denoiser" else []
        if settings.init is not None and not any((self.out / name).exists() for name in whole):
            _start_from(model, config, settings.init, console)
        crops, val = self._data(console)
        with self._claimed():
            return self._train(model, crops, val, console)

    def _train(self, model: nn.Module, crops: RandomCrops, val: Images | None, console: Console) -> float | None:
        settings, config = self.settings, self.config
        steps, runner = settings.pretraining_steps or 0, None
        pretrained = self.out / "pretrained.safetensors"
        if pretrained.exists():
            found, of = load_checkpoint(pretrained)
            if of != config:
                raise CheckpointError(f"{pretrained}: of another network than this run's")
            model.load_state_dict(found.state_dict())
            self.saved = "pretraining", steps
        elif steps and not (self.out / "training.ckpt").exists():
            console.print(f"Pretraining the denoiser: {steps} steps.", highlight=False)
            low, high = settings.pretraining_noise
            task = DenoiserTask(
                denoiser_of(model), (low, high), self._optimization(settings.pretraining_rate), settings.seed
            )
            runner = self._fit("pretraining", task, crops, val, steps)
            self._save(pretrained, model, config)
        if config.form != "denoiser":
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

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """Within, the directory is this run's alone; what ends the run there says what is left of it."""
        with ExitStack() as stack:
            if rank() == 0:
                self.out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.out))
                self._check_new()  # another can have come before
                write_settings(self.out / "config.yaml", self.settings)
                write_photographs(self.out / "photographs.json", self.photographs)
            try:
                yield
            except Interrupted as stop:
                raise Interrupted(stop.signal, self._left()) from None
            except OSError as error:
                raise OSError(f"{checks.one_line(error)}; {self._left()}") from error

    def _save(self, path: Path, model: nn.Module, config: ModelConfig, half: bool = False) -> None:
        if rank() == 0:
            save_checkpoint(path, model, config, half=half)
