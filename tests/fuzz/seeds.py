"""Small valid files for each reader of `fuzz.readers`, all made here."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

import jfbfast
from helpers import photographs
from jfbfast.experiments.callbacks import _COLUMNS as METRICS
from jfbfast.experiments.run_files import CheckpointFiles
from jfbfast.experiments.settings import make_settings
from jfbfast.models.checkpoint import save_checkpoint
from jfbfast.models.config import ModelConfig

DNCNN = {"kind": "DnCNN", "features": 2, "depth": 2, "norm": None, "spectral_norm": False, "residual": True}
UNET = {"kind": "UNet", "features": [2, 4], "blocks": [1, 1]}
CONFIGS = (
    ModelConfig(denoiser=DNCNN),
    ModelConfig("paper", DNCNN | {"residual": False}, solver={"kind": "Picard"}, gradient={"kind": "neumann"}),
    ModelConfig("denoiser", {"kind": "NonexpansiveDenoiser", "features": 2, "depth": 2}),
    ModelConfig("feed-forward", UNET, sigma=2.0, padding_mode="circular"),
)


def _saved_array(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def images() -> list[bytes]:
    """Photographs of every format, depth, orientation and kind of metadata, and arrays of numpy."""
    of = photographs.samples
    grey, colour, alpha = of("uint8", 1), of("uint8", 3), of("uint8", 4)
    palette = photographs.Image.fromarray(colour).quantize(8)
    found = [photographs.tagged(kind, colour, 6) for kind in ("png", "tiff", "jpeg", "webp")]
    found += [photographs.png(of(dtype, channels)) for dtype in ("uint8", "uint16") for channels in (1, 2, 3, 4)]
    found += [photographs.png(of("uint8", 2)[:, :, 0], depth=depth) for depth in (1, 2, 4)]
    found += [photographs.pillow(palette, kind) for kind in ("PNG", "BMP", "TIFF")]
    found += [photographs.pillow(colour, kind) for kind in ("BMP", "JPEG", "WEBP")]
    found += [photographs.pillow(grey[:, :, 0], "JPEG"), photographs.pillow(alpha, "WEBP", lossless=True)]
    found += [photographs.tiff(of(dtype, channels)) for dtype in ("uint16", "float32") for channels in (1, 3, 4)]
    found += [photographs.tiff(colour, compression=kind, predictor=True) for kind in ("zlib", "lzma")]
    found += [photographs.tiff(of("uint8", 5), planarconfig="separate", photometric="minisblack")]
    found += [photographs.tiff(of("uint16", 3, (32, 48)), tile=(16, 16), byteorder=">"), photographs.lzw_tiff(colour)]
    found += [b"P5 # grey\n3 2 255\n" + bytes(6), b"P6\n3 2\n1000\n" + bytes(36)]
    return [*found, _saved_array(of("float32", 3)), _saved_array(of("uint16", 4).transpose(2, 0, 1))]


def point_spreads() -> list[bytes]:
    disc = jfbfast.point_spread.defocus(2.0).numpy()
    levels = (disc / disc.max() * 65535).astype(np.uint16)
    files = [photographs.png(levels[:, :, None]), photographs.tiff(levels), photographs.tiff(disc.astype(np.float32))]
    files += [photographs.png(np.repeat(levels[:, :, None], 3, 2)), _saved_array(disc), _saved_array(disc > 0)]
    return [*files, _saved_array(np.asfortranarray(disc.astype(">f4")))]


def checkpoints() -> list[bytes]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model")
        for config in CONFIGS:
            save_checkpoint(path, config.model(), config, half=config.form == "denoiser")
            found.append(path.read_bytes())
    return found


def models() -> list[nn.Module]:
    """Models for `save_pretrained`, with every kind of part that a description can name."""
    blur, psf = jfbfast.GaussianBlur(3), jfbfast.point_spread.motion(3.0, 30.0)

    def unet(**options: Any) -> jfbfast.UNet:
        return jfbfast.UNet(1, features=(2, 4), blocks=(1, 1), **options)

    red = jfbfast.RED(unet(injection=True), filter_damping="weight")
    noisy = jfbfast.data_fidelity.Poisson(gain=0.1)
    return [
        jfbfast.DEGrad(blur, red, preconditioner="exact", gradient=jfbfast.Neumann(2)),
        jfbfast.DEGrad(jfbfast.Blur(psf), jfbfast.RED(unet()), solver=jfbfast.Broyden(), data_fidelity=noisy),
        jfbfast.DEGrad(jfbfast.SeparableBlur([1.0, 2, 1], [1.0]), jfbfast.DnCNN(1, features=2, depth=2), step_size=0.5),
        jfbfast.DEProx(blur, unet(), gradient=jfbfast.Implicit("cg", tol=1e-4)),
        jfbfast.PlugAndPlay(unet(conditions=1)),
        unet(),
    ]


def directories() -> list[bytes]:
    """``config.json`` of each of `models`, after a byte that says which one's weights lie beside it."""
    found = []
    for number, model in enumerate(models()):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found.append(bytes([number]) + Path(folder, "config.json").read_bytes())
    return found


def settings() -> list[bytes]:
    found: list[dict[str, Any]] = [{"data": "photographs"}]
    found += [{"data": "x", "denoiser": "UNet", "features": [8, 16], "blocks": [1, 1], "learning_rate": "1e-3"}]
    found += [{"data": "x", "form": "universal", "denoiser": "UNet", "sigma_range": "0.5,2", "noise_range": [0, 0.1]}]
    found += [{"data": "x", "solver": "Picard", "gradient": "neumann:terms=3", "steps": 10, "flips": False}]
    resolved = vars(make_settings(found[0]).resolved())
    found.append({name: list(value) if isinstance(value, tuple) else value for name, value in resolved.items()})
    return [yaml.safe_dump(each).encode() for each in found]


def run_checkpoints() -> list[bytes]:
    files, network = CheckpointFiles("training", {}), nn.Linear(2, 1)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {"global_step": 3, "state_dict": network.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    with tempfile.TemporaryDirectory() as folder:
        files.save_checkpoint(state, Path(folder, "a.ckpt"))
        return [Path(folder, "a.ckpt").read_bytes()]


def run_texts() -> list[bytes]:
    """``photographs.json`` and ``metrics.csv`` of a run."""
    names = json.dumps({"training": ["a.png", "b/c.png"], "validation": []})
    row = ["training", "1", "0.5", "0.1"] + [""] * (len(METRICS) - 4)
    return [names.encode(), "\r\n".join((",".join(METRICS), ",".join(row), "")).encode()]
