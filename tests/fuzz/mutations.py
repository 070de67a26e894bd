"""Changes of files that keep what would stop a reader at once: checksums, headers, digests, the grammar of JSON."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from contextlib import suppress
from typing import Any

import safetensors.torch

from jfbfast.models.checkpoint import digest

_NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 10**12, 10**400)
_VALUES = (*_NUMBERS, None, True, False, 0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), "", "1", [], {}, [1])
_WORDS = (
    *("Anderson", "Broyden", "Picard", "Inertial", "JFB", "Neumann", "Implicit", "Unrolled", "Shine", "Phantom"),
    *("UNet", "DnCNN", "RED", "DEGrad", "DEProx", "DEADMM", "PlugAndPlay", "UniversalDEGrad", "FeedForward", "Poisson"),
    *("GaussianBlur", "SeparableBlur", "Blur", "IterativeOperator", "WeightedLeastSquares", "tensor", "dtype"),
    *("external", "paper", "universal", "denoiser", "feed-forward", "plug-and-play", "auto", "exact", "valid", "zeros"),
)


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change, cut, insert or repeat a few bytes."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place, action = rng.randrange(len(content) + 1), rng.randrange(6)
        if action == 0 or not content:
            content.insert(place, rng.randrange(256))
        elif action == 1:
            content[place % len(content)] ^= 1 << rng.randrange(8)
        elif action == 2:
            width, order = rng.choice((1, 2, 4, 8)), rng.choice("<>")
            number = rng.choice(_NUMBERS[:-1]) % 256**width
            content[place : place + width] = number.to_bytes(width, "little" if order == "<" else "big")
        elif action == 3:
            del content[place : place + rng.choice((1, 2, 8, 64, 1024))]
        elif action == 4:
            start, length = rng.randrange(len(content)), rng.choice((1, 4, 12, 64))
            content[place:place] = content[start : start + length]
        else:
            content[place % len(content)] = rng.randrange(256)
    return bytes(content)


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Every container of a tree of JSON, with each of its keys."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, child in children for found in ((node, key), *_places(child))]


def change_tree(tree: Any, rng: random.Random) -> Any:
    """Replace, remove, rename or exchange a few values of a tree of JSON."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = _places(tree)
        if not places:
            return rng.choice(_VALUES)
        node, key = rng.choice(places)
        action = rng.randrange(6)
        if action == 0:
            del node[key]
        elif action == 1:
            other, name = rng.choice(places)
            if name in (other if isinstance(other, dict) else range(len(other))):
                node[key] = json.loads(json.dumps(other[name]))
        elif action == 2 and isinstance(node, dict):
            _, name = rng.choice(places)
            node[str(name)] = node.pop(key)
        elif action == 3 and isinstance(node[key], (int, float)):
            node[key] = rng.choice((node[key] + 1, -node[key], node[key] * 1000, node[key] / 3, str(node[key])))
        elif action == 4:
            node[key] = rng.choice(_WORDS)
        else:
            node[key] = rng.choice(_VALUES)
    return tree


def change_json(data: bytes, rng: random.Random) -> bytes:
    return json.dumps(change_tree(json.loads(data), rng)).encode()


def change_directory(data: bytes, rng: random.Random) -> bytes:
    return data[:1] + change_json(data[1:], rng)


def change_checkpoint(data: bytes, rng: random.Random) -> bytes:
    """Change the settings or a tensor of a checkpoint, and correct its digest."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])["__metadata__"]
    tensors = safetensors.torch.load(data)
    if rng.random() < 0.2:
        name = rng.choice(sorted(tensors))
        value = tensors[name]
        tensors[name] = rng.choice((value.double(), value[None], value / 0, value.int()))
    config = json.dumps(change_tree(json.loads(header["config"]), rng))
    return safetensors.torch.save(tensors, {**header, "config": config, "digest": digest(config, tensors)})


def change_png(data: bytes, rng: random.Random) -> bytes:
    """Change one chunk of a PNG, or its compressed content, and correct the checksums."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunks.append((kind, data[at + 8 : at + 8 + length]))
        at += 12 + length
    number = rng.randrange(len(chunks))
    kind, content = chunks[number]
    if kind == b"IDAT":
        content = zlib.compress(change_bytes(zlib.decompress(content), rng))
    elif kind == b"iCCP" and rng.random() < 0.5:
        name, _, profile = content.partition(b"\0")
        content = name + b"\0\0" + zlib.compress(change_bytes(zlib.decompress(profile[1:]), rng))
    else:
        content = change_bytes(content, rng)
    chunks[number] = (kind, content)
    if rng.random() < 0.2:
        chunks.insert(rng.randrange(len(chunks)), rng.choice(chunks))
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return b"".join([data[:8], *parts])


def change_zip(data: bytes, rng: random.Random) -> bytes:
    """Change one member of an archive of zip, and correct the checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        members = [(info, old.read(info)) for info in old.infolist()]
        chosen = rng.randrange(len(members)) if rng.random() < 0.3 else 0  # the first one is the pickle
        for number, (info, content) in enumerate(members):
            new.writestr(info, change_bytes(content, rng) if number == chosen else content)
    return out.getvalue()


def change_lines(data: bytes, rng: random.Random) -> bytes:
    """Change a value of a file of YAML or CSV, or move a line."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    name = lines[place].partition(b":")[0]
    if rng.random() < 0.7:
        value = rng.choice((*map(str, _VALUES), *_WORDS, "1,2", "~", "2020-01-01", "0x10", "!!python/none", "1:2", "'"))
        lines[place] = name + b": " + value.encode()
    else:
        lines.insert(place, rng.choice(lines))
    return b"\n".join(lines)


_STRUCTURES = {
    "image": change_png,
    "psf": change_png,
    "checkpoint": change_checkpoint,
    "directory": change_directory,
    "settings": change_lines,
    "run": change_zip,
    "text": change_json,
}


def change(name: str, data: bytes, rng: random.Random) -> bytes:
    """Change a file of the reader ``name``: its structure if it still has one, otherwise its bytes."""
    if rng.random() < 0.7:
        with suppress(Exception):  # the file is damaged already
            return _STRUCTURES[name](data, rng)
    return change_bytes(data, rng)
