"""Check an installed wheel: the command, the kernels, one restored photograph, and one OpenMP runtime.

python tests/check_wheel.py [--pure]      # --pure: the wheel without compiled modules
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ONE_RUNTIME = """
import re, {first}, {second}
blur = jfbfast.GaussianBlur(sigma=1.0)
blur(torch.rand(4, 3, 256, 256)) + torch.rand(1000, 1000).exp().sum()  # both have computed with several threads
with open("/proc/self/maps") as maps:
    print(*sorted(set(re.findall(r"\\S+/lib\\w*omp\\w*[-.\\w]*\\.so\\S*", maps.read()))))
"""


def output(*command: str, folder: str) -> str:
    """What a command prints; it has to succeed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:  # where no jfbfast/ lies that Python could import instead
        print(output(sys.executable, "-m", "jfbfast", "--version", folder=folder).strip())
        told = output(sys.executable, "-m", "jfbfast", "info", folder=folder)
        (kernels,) = (line for line in told.splitlines() if "native (CPU)" in line)
        print(kernels)
        if ("unavailable" in kernels) != ("--pure" in sys.argv):
            sys.exit(f"not the kernels that this wheel is for: {kernels}")
        Image.radial_gradient("L").convert("RGB").resize((160, 120)).save(Path(folder, "photo.png"))
        print(output(sys.executable, "-m", "jfbfast", "restore", "photo.png", "--sigma", "1.5", folder=folder))
        if Image.open(Path(folder, "photo-restored.png")).size != (160, 120):
            sys.exit("the restored photograph has another size")
        if sys.platform == "linux":
            for first, second in (("torch", "jfbfast"), ("jfbfast", "torch")):
                code = ONE_RUNTIME.format(first=first, second=second)
                runtimes = output(sys.executable, "-c", code, folder=folder).split()
                print(f"OpenMP, {first} imported first: {runtimes}")
                if len(runtimes) != 1:
                    sys.exit("that is not one OpenMP runtime")


if __name__ == "__main__":
    main()
