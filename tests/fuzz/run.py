"""Fuzz the readers of images and of trained networks: python tests/fuzz/run.py --seconds 120

Each reader gets its share of the time in a process of its own, with atheris (libFuzzer), which keeps the inputs that
reach new code. It ends with status 1 after a finding, and says which file holds the input.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

_LIMITS = ("-timeout=60", "-rss_limit_mb=4000", "-max_len=100000", "-len_control=0")
_INSTRUMENTED = ["jfbfast", "tifffile", "PIL", "yaml"]
_NAMES = ("image", "psf", "checkpoint", "directory", "settings", "run", "text")


def fuzz(name: str, folder: Path, options: list[str]) -> None:
    """Fuzz one reader in this process and this folder, until libFuzzer ends it."""
    import atheris
    import torch

    torch.set_num_threads(1)
    with atheris.instrument_imports(include=_INSTRUMENTED, enable_loader_override=False):
        from fuzz import mutations
        from fuzz.readers import Harness, limit_pixels

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = mutations.change(name, data, rng) if rng.random() < 0.7 else atheris.Mutate(data, len(data) + 16)
        return changed[:most]

    limit_pixels()
    os.chdir(folder)
    harness = Harness(name, folder)
    atheris.Setup([sys.argv[0], *options], lambda data: harness.read(data) and None, custom_mutator=mutate)
    atheris.Fuzz()


def run(name: str, seconds: float, out: Path) -> bool:
    """Fuzz one reader for some time in a process; whether there is no finding."""
    from fuzz.readers import INPUT, READERS

    corpus = out / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(READERS[name].seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [str(corpus), f"-max_total_time={max(1, int(seconds))}", *_LIMITS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--reader", name, "--folder", folder, *options]
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
        if ended.returncode:
            shutil.copy(Path(folder, INPUT), out / f"{name}.finding")
    told = ended.stdout + ended.stderr
    (out / f"{name}.log").write_text(told, encoding="utf-8")
    counts = re.findall(r"#(\d+)\s.*?cov: (\d+)", told)
    (first, *_, last) = counts if len(counts) > 1 else [("0", "0")] * 2
    print(f"{name}: {last[0]} inputs, coverage {first[1]} to {last[1]}, {len(list(corpus.iterdir()))} kept", flush=True)
    if ended.returncode:
        about = [line for line in told.splitlines() if not line.startswith(("#", "INFO"))]
        print("\n".join([*about[-80:], f"The input is in {out / name}.finding"]), flush=True)
    return ended.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120, help="for all readers together")
    parser.add_argument("--out", type=Path, help="keeps the inputs that reached new code, to go on from")
    parser.add_argument("--reader", choices=_NAMES, action="append")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments, options = parser.parse_known_args()
    if arguments.folder:
        fuzz(arguments.reader[0], arguments.folder, options)
        return 0
    names = arguments.reader or _NAMES
    out = (arguments.out or Path(tempfile.mkdtemp(prefix="fuzz-"))).resolve()
    sound = [run(name, arguments.seconds / len(names), out) for name in names]
    return 0 if all(sound) else 1


if __name__ == "__main__":
    sys.exit(main())
