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
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import nn

from jfbfast import checks
from jfbfast.backends.dispatch import ONEDNN_HAS_BFLOAT16
from jfbfast.experiments.callbacks import Checkpoints, Metrics
from jfbfast.experiments.initial_weights import denoiser_of, start_from
from jfbfast.experiments.loggers import check_logger, run_logger
from jfbfast.experiments.processes import Interrupted, check_launch, rank, world
from jfbfast.experiments.run_data import Directory, GivenDataset, check_same, is_dataset
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
from jfbfast.experiments.team import agreed, begin, gathered, lost_process_is_named, restarted, team
from jfbfast.experiments.trainer import MovingAverage, TrainingError, fit
from jfbfast.imaging.datasets import Images, RandomCrops
from jfbfast.models.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from jfbfast.models.degrad import DEGrad
from jfbfast.models.denoisers import freeze_statistics
from jfbfast.models.universal import UniversalDEGrad

PATIENCE = 1800.0  # seconds that one of torchrun's processes waits for the others, as they load photographs too


def start_run(
    values: Mapping[str, Any],
    out: Path,
    console: Console,
    *,
    resume: bool = False,
    progress: bool = True,
    dataset: GivenDataset | None = None,
) -> float | None:
    """Train in a directory, in this process or in all of torchrun's, which go on with the run if they are restarted.

    Args and raises as `Run`, and its method `train`, whose value it returns.
    """
    with team(PATIENCE, "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"):
        again = restarted(str(out)) and (out / "config.yaml").exists()

        def prepare() -> tuple[Run, Any]:
            run = Run(values, out, resume=resume or again, progress=progress, dataset=dataset)
            size, parts = run.settings.batch_size, run.settings.measurements if run.settings.form == "universal" else 1
            if size % (world() * parts):
                takes = f"the {world()} processes" + (f", times {parts} measurements in each" if parts > 1 else "")
                raise ValueError(f"batch_size is {size}; it takes a multiple of {takes}")
            return run, (run.settings, run.resume, run.files() if run.resume else [])

        differing = f"the processes find different files in {out}; to go on, all machines must share it, or have copies"
        run = agreed(prepare, differing)
        begin(str(out))
        return run.train(console)


class Run:
    """A run of `jfbfast train` in a directory.

    Args:
        values: the settings that were chosen, by name.
        out: the directory.
        resume: continue the run in the directory, from its last checkpoint. It may have more steps than the run had.
        progress: show progress bars.
        dataset: the images to train on, in place of the photographs of the setting ``data``.

    Raises:
        ValueError: a setting is not valid, or not the resumed run's; the directory holds a run already, or none to
            resume.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        out: Path,
        *,
        resume: bool = False,
        progress: bool = True,
        dataset: GivenDataset | None = None,
    ) -> None:
        file = out / "config.yaml"
        self.out, self.resume, self.progress, self.dataset = out, resume, progress, dataset
        if out.exists() and not out.is_dir():
            raise ValueError(f"out is the file {out}; it takes a directory")
        check_launch("train")
        if dataset is not None:
            values = {**values, "data": dataset.data}
        if resume:
            if not file.exists():
                raise ValueError(f"{out} holds no run to resume")
            started = read_run_settings(file)
            self.settings = make_settings({**vars(started), **values}).resolved()
            for name, old in vars(started).items():
                new = getattr(self.settings, name)
                raised = name == started.extendable and new > old
                if new != old and name not in CIRCUMSTANCES and not raised:
                    more = "; it can only be raised" if name == started.extendable else ""
                    raise ValueError(f"{name} is {new}; the run in {out} was started with {old}{more}")
        else:
            self._check_new()
            self.settings = make_settings(values).resolved()
        check_logger(self.settings.logger)
        if dataset is None:
            if is_dataset(self.settings.data):
                raise ValueError(
                    f"the run in {out} trains on a dataset that was given in Python; go on there with: "
                    f"jfbfast.train(dataset, {str(out)!r}, resume=True)"
                )
            data = str(Path(self.settings.data).resolve())  # so that the run can resume from any directory
            self.settings = replace(self.settings, data=data)
        self.config = self.settings.model_config()
        self.photographs: dict[str, list[str]] = {}
        self.saved: tuple[str, int] | None = None  # the phase and the step that the directory holds

    def files(self) -> list[tuple[str, int]]:
        """The names and sizes of what a resumed run reads."""
        names = ("config.yaml", "photographs.json", "pretraining.ckpt", "training.ckpt", "pretrained.safetensors")
        return [(name, (self.out / name).stat().st_size) for name in names if (self.out / name).exists()]

    def _check_new(self) -> None:
        if not self.resume and rank() == 0 and (self.out / "config.yaml").exists():
            raise ValueError(f"{self.out} holds a run already; choose another directory, or resume it")

    def _data(self, console: Console) -> tuple[RandomCrops, Images | None]:
        """The training crops and the validation images; sets ``photographs``, their names."""
        settings, file = self.settings, self.out / "photographs.json"

        def say(text: str) -> None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

        images = (self.dataset or Directory(settings.data)).load(settings, self.config, say)
        if self.resume and file.exists():  # old runs have none
            check_same(images, read_photographs(file), settings.data, self.out)
        self.photographs = images.names
        training, validation = images.training, images.validation
        say(f"{len(training)} photographs to train on, {len(validation)} to validate on.")
        length = settings.batch_size * max(settings.steps, settings.pretraining_steps or 0)
        crops = RandomCrops(training, settings.crop, length, settings.flips, settings.seed)
        return crops, Images(validation, settings.resize or settings.crop, settings.seed) if validation else None

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
        files = CheckpointFiles(phase, kept, settings.extendable)

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
        with run_logger(settings.logger, self.out, phase, vars(settings)) as logger:
            try:
                with lost_process_is_named():
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
                        logger=logger or False,
                        plugins=[files],
                    )
            except TrainingError as error:
                raise TrainingError(f"{error}; {self._advice(phase)}") from error
            except OSError:
                raise
            except Exception as error:
                if resuming and not checkpoints.started:
                    raise CheckpointError(
                        f"{file}: not a whole checkpoint of a run ({checks.one_line(error)})"
                    ) from error
                raise

    def _state(self) -> str:
        """A sentence about what is saved of the run, and the command that continues it."""
        command = f"jfbfast train --out {shlex.quote(str(self.out))} --resume"
        if self.dataset is not None:
            command = f"jfbfast.train(dataset, {str(self.out)!r}, resume=True)"
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
            start_from(model, config, settings, console)
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
        if pretrained.exists() and config.form != "denoiser":
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
        gathered(None)  # until the first process has written the file
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
