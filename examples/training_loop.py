"""What train_denoiser.py and train_universal.py share: their options, the crops of photographs, and the loop.

Both run on the CPU or on a GPU, on which the crops are made too. They end after ``--steps`` or ``--minutes``, in which
the learning rate falls to 0. Every two minutes, and at the end, they write the network to OUT and the state of the
training to OUT.state. With ``--resume`` a later run goes on from that state. So a long training can be made of short
runs, each with ``--stop-after``.

Batch i depends on the seed and on i alone, so a resumed training sees the batches that it would have seen.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jfbfast
from jfbfast.experiments.muon import Muon
from jfbfast.files import write_whole
from jfbfast.imaging.datasets import Photographs
from jfbfast.imaging.light import to_linear
from jfbfast.models.checkpoint import save_checkpoint
from jfbfast.models.config import ModelConfig

SIDE = 80  # pixels of a crop
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")
_SAVE_EVERY = 120  # seconds


def parser(description: str, *, steps: float, minutes: float, rate: float, decay: float) -> argparse.ArgumentParser:
    """The options of both scripts, with the defaults in which they differ."""
    options = argparse.ArgumentParser(description=description)
    add = options.add_argument
    add("photographs", type=Path, help="directory of photographs")
    add("out", type=Path, help="file of the trained network")
    add("--held-out", type=int, default=15, help="photographs, the last by name, to leave out")
    add("--init", help="a shipped network, a file or a directory to start from")
    add("--steps", type=float, default=steps, help="after which training ends")
    add("--minutes", type=float, default=minutes, help="after which training ends; on a CPU of processor time")
    add("--stop-after", type=float, default=math.inf, help="minutes after which this run stops, to be resumed")
    add("--resume", action="store_true", help="go on from OUT.state, with the same options")
    add("--batch", type=int, default=16, help="crops in a batch")
    add("--rate", type=float, default=rate, help="learning rate of Muon")
    add("--decay", type=float, default=decay, help="share of the training in which the rate falls to 0")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda, if there is a GPU")
    add("--bfloat16", action="store_true", help="compute the network's convolutions in bfloat16")
    return options


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a GPU gets it from pinned memory, so that the program need not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Crops:
    """Random crops of photographs, made on the device.

    Args:
        given: the options of `parser`.
        device: of the crops; a GPU keeps all photographs in its memory.
    """

    def __init__(self, given: argparse.Namespace, device: torch.device) -> None:
        files = sorted(file for file in given.photographs.rglob("*") if file.suffix.lower() in SUFFIXES)
        kept = files[: len(files) - given.held_out]
        photographs = Photographs(kept, least=2 * SIDE, purpose="a crop that is shrunk by two")
        areas = np.array([height * width for height, width in photographs.sizes], float)
        self.share = areas / areas.sum()
        self.photographs = photographs if device.type == "cpu" else [each.to(device) for each in photographs]
        self.device = device

    def batch(self, g: np.random.Generator, size: int) -> Tensor:
        """(size, 3, SIDE, SIDE) on [−1, 1]."""
        return torch.stack([self._image(g) for _ in range(size)])

    def _image(self, g: np.random.Generator) -> Tensor:
        """A crop in nine of ten; one in twenty is flat areas, and one in twenty is a grey crop."""
        kind = g.random()
        if kind < 0.05:
            return sent(_flat_areas(g), self.device)
        x = self._crop(g)
        return x.mean(0, keepdim=True).expand_as(x) if kind < 0.1 else x

    def _crop(self, g: np.random.Generator) -> Tensor:
        """Half of the crops are shrunk by up to two, half are mirrored or turned, and 15% are linear light."""
        photograph = self.photographs[int(g.choice(len(self.photographs), p=self.share))]
        side = SIDE if g.random() < 0.5 else round(SIDE * g.uniform(1, 2))
        top, left = (int(g.integers(n - side + 1)) for n in photograph.shape[1:])
        x = photograph[None, :, top : top + side, left : left + side].float()
        if photograph.dtype != torch.uint8:  # of more than 8 bits
            x = 255 * x
        if side != SIDE:
            x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True).round()
        x = x.flip(-1) if g.random() < 0.5 else x
        x = x.mT if g.random() < 0.5 else x
        x = x[0] / 127.5 - 1
        return to_linear(x) if g.random() < 0.15 else x


def _flat_areas(g: np.random.Generator) -> Tensor:
    """Up to three straight edges between colours, of which about half are black or white in each channel."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    image = torch.zeros(3, SIDE, SIDE)
    for part in range(int(g.integers(1, 5))):
        colour = torch.from_numpy((3 * g.random(3) - 1.5).clip(-1, 1)).float()
        if g.random() < 0.3:
            colour = colour[:1].expand(3)
        angle, offset = g.uniform(0, 2 * math.pi), g.uniform(0, SIDE)
        distance = math.cos(angle) * (x - SIDE / 2) + math.sin(angle) * (y - SIDE / 2)
        image[:, (distance > offset - SIDE / 2) | (part == 0)] = colour[:, None]
    return image


class Step(NamedTuple):
    """What a step of training computed.

    Attributes:
        error: the mean squared error of each sample, (B,).
        reference: of the decibels that are printed, 10 log₁₀(reference / error).
        penalty: to be added to the loss.
    """

    error: Tensor
    reference: Tensor | float
    penalty: Tensor | float = 0.0


def train(
    given: argparse.Namespace,
    model: nn.Module,
    config: ModelConfig,
    make_batch: Callable[[np.random.Generator, torch.Generator, int], Any],
    compute: Callable[[Any, int, float], Step],
    unit: str,
) -> None:
    """Train the model, and write the moving average of its weights.

    Args:
        given: the options of `parser`.
        model: on its device.
        config: its settings, for the file.
        make_batch: makes the batch of a step, whose number it gets, from random numbers of the CPU and of the device.
        compute: the errors of the model for a batch, in the step of this number, after this share of the training.
        unit: of the decibels that are printed.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32, where the library does not need more
        torch.backends.cudnn.benchmark = True
    average = copy.deepcopy(model)  # exponential moving average of the weights
    optimizer = Muon(model, learning_rate=given.rate)
    rates = [group["lr"] for group in optimizer.param_groups]
    step, before = 0, 0.0  # what earlier runs did, and their seconds
    file = Path(f"{given.out}.state")
    if given.resume:
        state = torch.load(file, map_location=device, weights_only=True)
        step, before = state["step"], state["seconds"]
        for each, name in ((model, "model"), (average, "average"), (optimizer, "optimizer")):
            each.load_state_dict(state[name])

    clock = time.monotonic if on_gpu else time.process_time
    started = saved = clock()
    batches = _batches(make_batch, given.seed, step, device)
    done = max(step / given.steps, before / (60 * given.minutes))
    while done < 1 and clock() - started < 60 * given.stop_after:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, (step + 1) / 100, (1 - done) / given.decay)
        batch = next(batches)
        torch.manual_seed(step)  # of what the model draws
        with torch.autocast(device.type, torch.bfloat16, enabled=given.bfloat16):
            error, reference, penalty = compute(batch, step, done)
        loss = (error * (5e-4 / (error.detach() + 1e-5))).mean() + penalty  # the gradient is that of the error in dB
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.02)
        optimizer.step()
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - min(0.998, (1 + step) / (10 + step)))
        step += 1
        if step % 20 == 0 or step == 1:
            decibels = float((10 * torch.log10(reference / error.detach())).mean())  # a GPU has finished the step now
            print(f"step {step}, {before + clock() - started:.0f} s: {decibels:.2f} {unit}", flush=True)
        seconds = before + clock() - started
        done = max(step / given.steps, seconds / (60 * given.minutes))
        if done >= 1 or clock() - saved > _SAVE_EVERY or clock() - started >= 60 * given.stop_after:
            parts = {"model": model, "average": average, "optimizer": optimizer}
            state = {name: dict(part.state_dict()) for name, part in parts.items()} | {"step": step, "seconds": seconds}
            write_whole(file, lambda partial, state=state: torch.save(state, partial))
            if hasattr(average, "set_measurement"):
                average.set_measurement(config.blur(), config.noise)  # instead of that of the last batch
            save_checkpoint(given.out, average, config, half=True)
            saved = clock()
    batches.close()
    told = "" if done >= 1 else "; go on with --resume"
    print(f"{given.out}: {step} steps, {100 * min(done, 1):.0f}% of the training{told}", flush=True)


def _batches(
    make: Callable[[np.random.Generator, torch.Generator, int], Any], seed: int, first: int, device: torch.device
) -> Generator[Any]:
    """The batches from this step on. For a GPU each is made while the step before runs."""

    def numbered(step: int) -> Any:
        g = np.random.default_rng([seed, step])
        return make(g, torch.Generator(device).manual_seed(int(g.integers(2**62))), step)

    if device.type != "cuda":
        yield from map(numbered, count(first))
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(numbered, first)
        for step in count(first + 1):
            ready = coming.result()
            coming = pool.submit(numbered, step)
            yield ready


def start(given: argparse.Namespace) -> torch.device:
    """Prepare the process, and return the device."""
    jfbfast.keep_freed_memory()
    torch.manual_seed(given.seed)
    return torch.device(given.device)
