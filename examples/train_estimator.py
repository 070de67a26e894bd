"""Train the estimator behind `jfbfast.estimate` on a directory of sharp photographs, and measure it on others.

python examples/train_estimator.py DIRECTORY --out FILE.npz          trains on all but the last 15 by name, and measures
python examples/train_estimator.py DIRECTORY --estimator FILE.npz    only measures, on the last 15
python examples/train_estimator.py DIRECTORY --shipped --held-out 0  measures what ships with jfbfast, on all
"""

import argparse
import io
import math
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from jfbfast import GaussianBlur
from jfbfast.imaging.estimation import LEAST_NOISE, estimator, features, predict
from jfbfast.imaging.light import to_encoded, to_linear
from jfbfast.imaging.photographs import image_files, read_photograph

HIDDEN, NETWORKS, EPOCHS, BATCH = 64, 3, 40, 256
SIGMAS, NOISES = (0.7, 1.0, 1.5, 2.0, 3.0), (0.0, 0.005, 0.01, 0.03)  # of the measurement
SURE = 1.35  # σ's range from end to end
SHARES = torch.tensor([0.1, 0.5, 0.9])


def log_uniform(low: float, high: float) -> float:
    return math.exp(random.uniform(math.log(low), math.log(high)))


def measured(sharp: Tensor, sigma: float, noise: float, linear: bool = False, rounded: bool = True, jpeg: int = 0):
    """Blur a photograph (C, H, W) in [−1, 1], add noise, round to 8 bits and compress (quality ``jpeg``; 0 is none).

    Returns:
        The result, smaller by the blur's margin, and the standard deviation of all that was added to the blurred one.
    """
    blur = GaussianBlur(sigma=sigma, padding_mode="valid")
    blurred = (to_encoded(blur(to_linear(sharp[None]))) if linear else blur(sharp[None]))[0]
    found = blurred + noise * torch.randn_like(blurred)
    if rounded or jpeg:
        levels = ((found.clamp(-1, 1) + 1) * 127.5).round()
        if jpeg:
            file, array = io.BytesIO(), levels.byte().permute(1, 2, 0).numpy()
            chroma = {"subsampling": random.choice((0, 2))} if len(levels) == 3 else {}
            Image.fromarray(array.squeeze(2) if len(levels) == 1 else array).save(file, "JPEG", quality=jpeg, **chroma)
            levels = torch.from_numpy(np.array(Image.open(file))).float()
            levels = levels[None] if levels.ndim == 2 else levels.permute(2, 0, 1)
        found = levels / 127.5 - 1
    error, unclipped = found - blurred, blurred.abs() < 0.9
    return found, float((error[unclipped] if unclipped.sum() > 1000 else error).square().mean().sqrt())


def crop_of_sharp(photo: Tensor, margin: int) -> Tensor:
    """A random crop in uint8 levels, shrunk by a random factor so that it is sharp: sides from 64 to about 600."""
    factor = 1.0 if random.random() < 0.1 else log_uniform(1, 4)
    side, (height, width) = log_uniform(80, 448), photo.shape[1:]
    h = max(64 + 2 * margin, int(min(side * math.exp(random.uniform(-0.3, 0.3)) + 2 * margin, height / factor - 1)))
    w = max(64 + 2 * margin, int(min(side + 2 * margin, width / factor - 1)))
    factor = max(1.0, min(factor, height / (h + 1), width / (w + 1)))
    h, w = min(height, math.ceil(h * factor)), min(width, math.ceil(w * factor))
    top, left = random.randint(0, height - h), random.randint(0, width - w)
    crop, size = photo[:, top : top + h, left : left + w], (int(h / factor), int(w / factor))
    kind = random.choice(("bilinear", "bicubic", "area", "lanczos"))
    if factor == 1:
        return crop.float()
    if kind == "lanczos":
        image = Image.fromarray(crop.permute(1, 2, 0).numpy()).resize(size[::-1], Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    antialias = {} if kind == "area" else {"antialias": True}
    return F.interpolate(crop.float()[None], size=size, mode=kind, **antialias)[0].clamp(0, 255)


def sample(photo: Tensor) -> tuple[Tensor, list[float]]:
    """The features of a random measurement of a photograph (3, H, W) in uint8, and its log σ and log noise."""
    sigma = 0.3 if random.random() < 0.05 else log_uniform(0.3, 4.2)
    noise = 0.0 if random.random() < 0.1 else 0.1 * random.random() ** 2
    x = crop_of_sharp(photo, math.ceil(3 * sigma)) / 127.5 - 1
    if random.random() < 0.25:  # grey
        x = x[random.randrange(3)][None] if random.random() < 0.5 else x.mean(0, keepdim=True)
    if random.random() < 0.5:
        x = x.flip(2)
    if random.random() < 0.5:
        x = x.transpose(1, 2)
    if random.random() < 0.2:  # another tone curve
        x = 2 * ((x + 1) / 2).clamp(0, 1) ** math.exp(random.uniform(-0.5, 0.5)) - 1
    if random.random() < 0.3:  # less contrast
        contrast = random.uniform(0.4, 1)
        x = x * contrast + random.uniform(contrast - 1, 1 - contrast)
    jpeg = random.randint(70, 98) if random.random() < 0.25 else 0
    found, noise = measured(x, sigma, noise, random.random() < 0.3, random.random() < 0.8, jpeg)
    return features(found), [math.log(sigma), math.log(max(noise, LEAST_NOISE))]


def train(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Fit the networks to features (B, n) and their log σ and log noise (B, 2), by the pinball loss of the quantiles.

    Koenker and Bassett, "Regression quantiles", 1978.
    """
    widths = (x.shape[1], HIDDEN, HIDDEN, 6)
    weights = {"mean": x.mean(0), "scale": x.std(0) + 1e-3}
    for i, (n, m) in enumerate(pairwise(widths)):
        bound = 1 / math.sqrt(n)
        weights[f"weight{i}"] = nn.Parameter(torch.empty(NETWORKS, m, n).uniform_(-bound, bound))
        weights[f"bias{i}"] = nn.Parameter(torch.zeros(NETWORKS, m))
    weights["bias2"].data[:, [1, 4]] = y.mean(0)  # outputs 1 and 4 are the medians
    learnt = [value for value in weights.values() if value.requires_grad]
    optimizer = torch.optim.AdamW(learnt, weight_decay=0.01)
    steps = EPOCHS * math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            noisy = x[rows] + 0.05 * weights["scale"] * torch.randn_like(x[rows])
            error = y[rows, :, None] - predict(weights, noisy, dropout=0.1)
            loss = NETWORKS * torch.maximum(SHARES * error, (SHARES - 1) * error).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return {name: value.detach() for name, value in weights.items()}


def middle(photo: Tensor, height: int, width: int) -> Tensor:
    """The middle of a photograph (C, H, W), at most that large, as values in [−1, 1]."""
    h, w = min(height, photo.shape[1]), min(width, photo.shape[2])
    top, left = (photo.shape[1] - h) // 2, (photo.shape[2] - w) // 2
    return photo[:, top : top + h, left : left + w] / 127.5 - 1


def errors(photos: list[Tensor], weights: dict[str, Tensor], side: int, sigma: float, noise: float, **kind) -> Tensor:
    """Measure the middle of each photograph, ``side`` pixels after the blur, and compare its estimate with the truth.

    Returns:
        One row for each: σ's ratio to the truth; the noise's; whether each is in its range; log(high / low).
    """
    rows, whole = [], side + 2 * math.ceil(3 * sigma)
    for photo in photos:
        found, truth = measured(middle(photo, whole, whole), sigma, noise, **kind)
        low, mid, high = predict(weights, features(found)[None]).mean((0, 1)).exp().unbind(1)
        true = torch.tensor((sigma, truth))
        rows.append(torch.cat((mid / true, ((low <= true) & (true <= high)).float(), (high[:1] / low[:1]).log())))
    return torch.stack(rows)


def words(rows: Tensor) -> str:
    """Median error of σ, share within 15%, and the noise's median ratio to the truth."""
    error = (rows[:, 0] - 1).abs()
    return f"{error.median():.1%}, {(error <= 0.15).float().mean():.0%}, {rows[:, 1].median():.2f}"


def report(photos: list[Tensor], weights: dict[str, Tensor], side: int) -> None:
    print(f"\nMiddles of {side}² (or less) of {len(photos)} photographs")
    print("σ's median error, share within 15%, median of the noise's ratio to the truth:\n")
    print("| σ |", *(f"noise {noise:g} |" for noise in NOISES), "0.005, JPEG 90 | 0.005, linear light |")
    print("| --- |" + " --- |" * (len(NOISES) + 2))
    columns = [{"noise": noise} for noise in NOISES]
    columns += [{"noise": 0.005, "jpeg": 90}, {"noise": 0.005, "linear": True}]
    found = torch.stack(
        [torch.stack([errors(photos, weights, side, sigma, **each) for each in columns]) for sigma in SIGMAS]
    )
    for sigma, row in zip(SIGMAS, found, strict=True):
        print(f"| {sigma:g} |", *(f"{words(cell)} |" for cell in row), flush=True)
    print("| all |", *(f"{words(found[:, i].flatten(0, 1))} |" for i in range(len(columns))))
    for name, part in (("plain", slice(4)), ("JPEG", slice(4, 5)), ("linear light", slice(5, 6))):
        rows = found[:, part].flatten(0, 2)
        inside, quiet, _ = rows[:, 2:].mean(0).tolist()
        sure = rows[rows[:, 4] < math.log(SURE)]
        print(f"{name}: {words(rows)}; in their ranges: σ {inside:.0%}, noise {quiet:.0%}")
        share = f"{len(sure) / len(rows):.0%} have σ's range within a factor of {SURE}"
        print(f"    {share}" + (f", and of these: {words(sure)}" if len(sure) else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of photographs, 8 bits")
    parser.add_argument("--samples", type=int, default=12_000, help="measurements to train on")
    parser.add_argument("--held-out", type=int, default=15, help="photographs to measure on: the last by name; 0: all")
    parser.add_argument("--out", type=Path, default=Path("estimator.npz"), help="the file to write")
    parser.add_argument("--estimator", type=Path, help="measure this one, without training")
    parser.add_argument("--shipped", action="store_true", help="measure the shipped one, without training")
    options = parser.parse_args()
    if options.held_out < 1 and not (options.shipped or options.estimator):
        parser.error("--held-out 0 leaves no photograph to train on")
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the patches are small

    read = (read_photograph(file).pixels for file in image_files(options.directory))
    photos = [(255 * pixels).round().byte() for pixels in read if min(pixels.shape[1:]) >= 64]
    training, held_out = photos[: -options.held_out], photos[-options.held_out :]
    if options.shipped:
        weights = estimator()
    elif options.estimator is None:
        made = []
        for i in range(options.samples):
            made.append(sample(random.choice(training)))
            if (i + 1) % 1000 == 0:
                print(f"{i + 1} of {options.samples} measurements", flush=True)
        x, y = zip(*made, strict=True)
        weights = train(torch.stack(x), torch.tensor(y))
        np.savez(options.out, **{name: value.numpy().astype(np.float16) for name, value in weights.items()})
    if not options.shipped:
        with np.load(options.estimator or options.out) as file:
            weights = {name: torch.from_numpy(file[name]).float() for name in file.files}
    for side in (256, 1024):
        report(held_out, weights, side)


if __name__ == "__main__":
    main()
