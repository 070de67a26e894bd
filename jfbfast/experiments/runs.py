"""A training run in a directory of its own.

The directory holds ``config.yaml`` (the resolved settings), ``photographs.json`` (the names of the photographs it
trains and validates on), ``metrics.csv`` (a row every few steps), ``pretraining.ckpt`` and ``training.ckpt`` (the state
of each phase after its last interval, or where a signal ended it), ``pretrained.safetensors`` and
``model.safetensors`` (the networks), and ``train.lock`` (locked by the process that trains there).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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
from jfbfast.experiments.callbacks import Checkpoints, Metrics
from jfbfast.experiments.processes import Interrupted, check_launch, rank
from jfbfast.experiments.run_files import CheckpointFiles, locked
from jfbfast.experiments.settings import (
    CIRCUMSTANCES,
    make_settings,
    read_photographs,
    read_run_settings,
    write_photographs,
    write_settings,
)
from jfbfast.experiments.tasks import (
    DeblurTask,
    DenoiserTask,
    JacobianPenalty,
    Measurements,
    Optimization,
    UniversalTask,
)
from jfbfast.experiments.trainer import MovingAverage, TrainingError, fit
from jfbfast.imaging.datasets import Images, RandomCrops, least_side, split, usable_photographs
from jfbfast.imaging.photographs import image_files
from jfbfast.models.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from jfbfast.models.config import ModelConfig
from jfbfast.models.degrad import DEGrad
from jfbfast.models.denoisers import freeze_statistics
from jfbfast.models.pretrained import load_model
from jfbfast.models.red import RED
from jfbfast.models.unet import UNet
from jfbfast.models.universal import UniversalDEGrad


class _Residual(nn.Module):
    """y − R(y): the paper's regulariser R seen as a denoiser."""

    def __init__(self, regularizer: nn.Module) -> None:
        super().__init__()
        self.regularizer = regularizer

    def forward(self, y: Tensor) -> Tensor:
        return y - self.regularizer(y)


def denoiser_of(model: nn.Module) -> nn.Module:
    """The denoiser inside a network of this library."""
    if isinstance(model, DEGrad):
        regularizer: nn.Module = model.regularizer
        return regularizer.denoiser if isinstance(regularizer, RED) else _Residual(regularizer)
    inner = getattr(model, "denoiser", model)
    assert isinstance(inner, nn.Module)
    return inner


def _take_weights(model: nn.Module, source: nn.Module) -> None:
    """Copy the weights of ``source``: the same network, one without injection, or one for a single setting.

    Raises RuntimeError for any other network.
    """
    weights, inner, given = source.state_dict(), denoiser_of(model), denoiser_of(source)
    if isinstance(inner, UNet) and isinstance(given, UNet):
        head = next(name for name in weights if name.endswith("head.weight"))
        weights[head] = inner.widened_head(given)
    model.load_state_dict(dict(weights))  # a plain dict has no metadata, which describes the source's blur


def _start_from(model: nn.Module, config: ModelConfig, path: str, console: Console) -> None:
    """Copy the weights of a shipped model or a file, which holds a network of the same form or a denoiser."""
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
    console.print(f"Starting from {path}" + (f". Its denoiser has no {new}." if new else "."), highlight=False)


class Run:
    """A run of `jfbfast train` in a directory.

    Args:
        values: the settings that were chosen, by name.
        out: the directory.
        resume: continue the run in the directory, from its last checkpoint.
        progress: show progress bars.

    Raises:
        ValueError: a setting is not valid, or not the resumed run's; the directory holds a run already, or none to
            resume.
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
            started = read_run_settings(file)
            self.settings = make_settings({**vars(started), **values}).resolved()
            for name, old in vars(started).items():
                new = getattr(self.settings, name)
                if new != old and name not in CIRCUMSTANCES:
                    raise ValueError(f"{name} is {new}; the run in {out} was started with {old}")
        else:
            self._check_new()
            self.settings = make_settings(values).resolved()
        data = str(Path(self.settings.data).resolve())  # so that the run can resume from any directory
        self.settings = replace(self.settings, data=data)
        self.config = self.settings.model_config()
        self.photographs: dict[str, list[str]] = {}
        self.saved: tuple[str, int] | None = None  # the phase and the step that the directory holds

    def _check_new(self) -> None:
        if not self.resume and rank() == 0 and (self.out / "config.yaml").exists():
            raise ValueError(f"{self.out} holds a run already; choose another directory, or resume it")

    def _data(self, console: Console) -> tuple[RandomCrops, Images | None]:
        """The training crops and the validation images."""
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
            least=1 if settings.resize else max(least_side(settings.crop), self.config.least_side),
            purpose=f"crops of {settings.crop} pixels",
        )
        photographs, validation = usable(kept), usable(held_out, needed=False)
        self._check_photographs(photographs.files, validation.files)
        say(f"{len(photographs)} photographs to train on, {len(validation)} to validate on.")
        if not photographs.cached:
            say(f"They take more than {settings.cache:g} GiB decoded, and are decoded at each use.")
        length = settings.batch_size * max(settings.steps, settings.pretraining_steps or 0)
        crops = RandomCrops(photographs, settings.crop, length, settings.flips, settings.seed)
        return crops, Images(validation, settings.resize or settings.crop, settings.seed) if validation else None

    def _check_photographs(self, kept: Sequence[Path], held_out: Sequence[Path]) -> None:
        """Set ``photographs``, the names relative to the directory; a resumed run must have the same ones."""
        data, file = self.settings.data, self.out / "photographs.json"
        self.photographs = {
            name: [path.relative_to(data).as_posix() for path in files]
            for name, files in (("training", kept), ("validation", held_out))
        }
        started = read_photographs(file) if self.resume and file.exists() else self.photographs  # old runs have no file
        for name, names in self.photographs.items():
            if names != started[name]:
                other = sorted(set(names).symmetric_difference(started[name]))
                raise ValueError(
                    f"data is {data}; its photographs for {name} are not those of the run in {self.out}: "
                    f"{len(other)} differ, such as {other[0]}"
                )

    def _fit(
        self,
        task: DeblurTask | DenoiserTask,
        train: RandomCrops,
        val: Images | None,
        steps: int,
        more: Sequence[Callback] = (),
    ) -> L.Trainer:
        """Train, from the task's last checkpoint if there is one."""
        settings, phase = self.settings, task.phase
        file = self.out / f"{phase}.ckpt"
        resuming = file.exists()
        kept = {name: value for name, value in vars(settings).items() if name not in CIRCUMSTANCES}
        files = CheckpointFiles(phase, kept)

        def saved(step: int) -> None:
            self.saved = phase, step

        step = 0
        if resuming:
            step = files.step(file, task, steps)
            saved(step)
        checkpoints = Checkpoints(file, saved)
        callbacks = [Metrics(self.out / "metrics.csv", phase, step, settings.log_every), *more]
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
            raise TrainingError(f"{error}; {self._advice(phase)}") from error
        except OSError:
            raise
        except Exception as error:
            if resuming and not checkpoints.started:
                raise CheckpointError(f"{file}: not a whole checkpoint of a run ({checks.one_line(error)})") from error
            raise

    def _state(self) -> str:
        """A sentence about what is saved of the run, and the command that continues it."""
        command = f"jfbfast train --out {shlex.quote(str(self.out))} --resume"
        if self.saved is None:
            return f"no step is saved yet; start with: {command}"
        phase, step = self.saved
        return f"step {step} of {phase} is saved; go on with: {command}"

    def _advice(self, phase: str) -> str:
        """A sentence about what to change in another run, after this phase has failed."""
        settings, pretrained, training = self.settings, self.out / "pretrained.safetensors", phase == "training"
        saved = "no step is saved" if self.saved is None else f"{phase}.ckpt holds step {self.saved[1]}"
        changes = ["a lower " + ("--learning-rate" if training else "--pretraining-rate")]
        if not settings.clip:
            changes.append("--clip 1")
        if training and settings.implicit and not settings.jacobian_penalty:
            changes.append("--jacobian-penalty 1e-3")
        if settings.precision != "32":
            changes.append("--precision 32")
        kept = f" (--init {pretrained} keeps the pretraining)" if training and pretrained.exists() else ""
        return f"{saved}; start another run with {' or '.join(changes)}{kept}"

    def train(self, console: Console) -> float | None:
        """Train, or continue training, until ``model.safetensors`` is written.

        Returns:
            The PSNR of the last validation in dB, at the true range 2 of images in [−1, 1]; None without validation.

        Raises:
            CheckpointError: a checkpoint of the run, or the one to start from, is damaged or another run's.
            ImageError: none of the photographs can be used.
            Interrupted, TrainingError: a signal asked the run to end, or its weights would be spoiled.
            OSError: a file cannot be written, as on a full disk; those written before are whole.
            ValueError: other photographs than a resumed run's, a setting that the network does not take, or another
                process trains in the directory.
        """
        settings, config = self.settings, self.config
        L.seed_everything(settings.seed, verbose=False)
        if settings.precision == "bf16" and not torch.accelerator.is_available() and not ONEDNN_HAS_BFLOAT16:
            console.print("This CPU has no bfloat16 convolutions in oneDNN: --precision 32 is several times faster.")
        model = config.model()
        with_all_weights = ["pretrained.safetensors", "training.ckpt"]
        with_all_weights += ["pretraining.ckpt"] if config.form == "denoiser" else []
        if settings.init is not None and not any((self.out / name).exists() for name in with_all_weights):
            _start_from(model, config, settings.init, console)
        crops, val = self._data(console)
        with self._claimed():
            return self._train(model, crops, val, console)

    def _train(self, model: nn.Module, crops: RandomCrops, val: Images | None, console: Console) -> float | None:
        settings, config, runner = self.settings, self.config, None
        steps, pretrained = settings.pretraining_steps or 0, self.out / "pretrained.safetensors"
        rate, first_rate = settings.learning_rate, settings.pretraining_rate
        assert rate is not None and first_rate is not None  # as the settings are resolved
        chosen = (settings.schedule, settings.warmup, settings.beta2, settings.optimizer)
        optimization, pretraining = Optimization(rate, *chosen), Optimization(first_rate, *chosen)
        if pretrained.exists():
            found, of = load_checkpoint(pretrained)
            if of != config:
                raise CheckpointError(f"{pretrained}: of another network than this run's")
            model.load_state_dict(found.state_dict())
            self.saved = "pretraining", steps
        elif steps and not (self.out / "training.ckpt").exists():
            console.print(f"Pretraining the denoiser: {steps} steps.", highlight=False)
            low, high = settings.pretraining_noise
            task = DenoiserTask(denoiser_of(model), (low, high), pretraining, settings.seed)
            runner = self._fit(task, crops, val, steps)
            self._save(pretrained, model)
        if settings.freeze_statistics:
            freeze_statistics(model)
        if config.form != "denoiser":
            console.print(f"Training the {config.form} network: {settings.steps} steps.", highlight=False)
            runner = self._fit(self._deblurring(model, optimization), crops, val, settings.steps)
        self._save(self.out / "model.safetensors", model, settings.half)
        quality = None if runner is None else runner.callback_metrics.get("val_psnr")
        return None if quality is None else float(quality)

    def _deblurring(self, model: nn.Module, optimization: Optimization) -> DeblurTask:
        """The task of the phase "training"."""
        settings, config = self.settings, self.config
        in_training: dict[str, Any] = {}
        contraction = None
        if isinstance(model, DEGrad):
            assert settings.training_tol is not None and settings.training_max_iter is not None
            solver = replace(model.solver, tol=settings.training_tol, max_iter=settings.training_max_iter)
            dtype = None if settings.solve_dtype == "float32" else getattr(torch, settings.solve_dtype)
            in_training = {"solver": solver, "solve_dtype": dtype}
        if settings.jacobian_penalty:
            interval, samples = settings.jacobian_interval, settings.jacobian_samples
            contraction = JacobianPenalty(settings.jacobian_penalty, settings.jacobian_bound, interval, samples)
        options: dict[str, Any] = {"seed": settings.seed, "in_training": in_training, "contraction": contraction}
        if isinstance(model, UniversalDEGrad):
            assert settings.sigma_range and settings.noise_range and settings.padding_mode
            blurs = settings.kernel_size, settings.padding_mode
            measurements = Measurements(settings.sigma_range, settings.noise_range, *blurs)
            return UniversalTask(model, measurements, optimization, parts=settings.measurements, **options)
        return DeblurTask(model, config.blur(), config.noise, optimization, **options)

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """Within this context, no other run uses the directory, and an error says what is saved of the run."""
        with ExitStack() as stack:
            if rank() == 0:
                self.out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.out))
                self._check_new()  # again, because another run may have started since
                write_settings(self.out / "config.yaml", self.settings)
                write_photographs(self.out / "photographs.json", self.photographs)
            try:
                yield
            except Interrupted as stop:
                raise Interrupted(stop.signal, self._state()) from None
            except OSError as error:
                raise OSError(f"{checks.one_line(error)}; {self._state()}") from error

    def _save(self, path: Path, model: nn.Module, half: bool = False) -> None:
        if rank() == 0:
            save_checkpoint(path, model, self.config, half=half)
