r"""
GPU and several machines
========================

This tutorial moves a training to a GPU, with lower precision where that is safe, and to several processes and machines.
What can run on a CPU runs here: a training loop of your own in two processes, and a folder of photographs that two
processes share. The rest is shown, to be copied.

To run it yourself: ``pip install 'jfbfast[train]'``.
"""

# %%
# A GPU
# -----
#
# ``model.to("cuda")`` is all. A model, its operator and its measurements have to be on the same device. The device of
# the tensors decides at each call which kernels compute: C++ on a CPU, Triton on a GPU. ``show_config`` tells what
# this machine has, and why something is missing.

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import skimage.data
import torch

import jfbfast
from jfbfast.imaging.photographs import Photograph, read_photograph, write_photograph

jfbfast.show_config()
device = "cuda" if torch.cuda.is_available() else "cpu"

# %%
# The blur and its measurements are small here, and the weights are random, since this page is about computing.

torch.manual_seed(0)
blur = jfbfast.GaussianBlur(sigma=1.5, padding_mode="reflect")
regularizer = jfbfast.RED(jfbfast.UNet(3, features=(16, 32), blocks=(1, 1), injection=True), filter_damping="weight")
model = jfbfast.DEGrad(blur, regularizer, preconditioner="exact").to(device)
x = torch.from_numpy(skimage.data.coffee()[100:164, 100:164]).permute(2, 0, 1)[None].to(device) / 127.5 - 1
d = blur(x) + 0.01 * torch.randn_like(x)

with torch.no_grad():
    exact = model(d)

# %%
# Mixed precision
# ---------------
#
# There are two ways, and they can be combined:
#
# - ``solve_dtype=torch.bfloat16``: the solve iterates in bfloat16 and ends in float32. It claims only what float32
#   confirms, so the result is as accurate as the tolerance says.
# - PyTorch's autocast around the training step, as for any network. The layer that is differentiated then runs in
#   bfloat16, too, and keeps half of the memory.
#
# Which is faster depends on the machine. On a CPU it is mostly float32. On a GPU nobody has measured it yet;
# ``jfbfast bench gpu`` does. There, float32 convolutions use TF32 by PyTorch's default. That suits the default
# tolerance of 1e-3; for a smaller one, a solve leaves TF32 out by itself.

model.solve_dtype = torch.bfloat16
with torch.no_grad():
    mixed = model(d)
model.solve_dtype = None

difference = float((mixed - exact).norm() / exact.norm())
print(f"difference by solve_dtype: {difference:.1e}; tolerance: {model.solver.tol:.0e}")
assert difference < 5 * model.solver.tol
assert model.solution.status.eq(jfbfast.Status.CONVERGED).all()

with torch.autocast(device, torch.bfloat16):
    loss = (model(d) - x).square().mean()
loss.backward()  # outside of autocast, as PyTorch advises

# %%
# CUDA graphs
# -----------
#
# On a GPU, small images take less time to compute than Python takes to start each kernel. ``cuda_graph=True`` records
# an evaluation of the layer once and replays it with a single launch:
#
# .. code-block:: python
#
#    model = jfbfast.DEGrad(blur, regularizer, preconditioner="exact", cuda_graph=True).to("cuda")
#
# Keep the size of the batches the same, since each size is recorded anew. It takes ``Anderson`` and a blur of jfbfast.
# Where something cannot be recorded, and on a CPU, the layer is evaluated as usual. This too is to be measured on your
# GPU first.
#
# A loop of your own in several processes
# ---------------------------------------
#
# PyTorch's ``DistributedDataParallel`` takes a model of jfbfast as it takes any other. Each process has a part of
# the batch, and the gradients are averaged in ``backward``. This is a whole program; ``torchrun`` starts it once for
# each process and tells each its rank:

LOOP = """
import os
import skimage.data
import torch
import torch.distributed
import torch.nn.functional as F
import jfbfast

gpu = torch.cuda.is_available()
torch.distributed.init_process_group("nccl" if gpu else "gloo")
rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")

torch.manual_seed(0)  # the same weights everywhere
blur = jfbfast.GaussianBlur(sigma=1.5, padding_mode="reflect")
denoiser = jfbfast.UNet(3, features=(8, 16), blocks=(1, 1), injection=True)
model = jfbfast.DEGrad(blur, jfbfast.RED(denoiser, filter_damping="weight"), preconditioner="exact").to(device)
parallel = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

photograph = torch.from_numpy(skimage.data.coffee()).permute(2, 0, 1)[None] / 127.5 - 1
squares = photograph.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 32, 32)
torch.manual_seed(1 + rank)  # another part of the batch in each process
for step in range(20):
    x = squares[torch.randint(len(squares), (8 // processes,))].to(device)
    d = blur(x) + 0.01 * torch.randn_like(x)
    loss = F.mse_loss(parallel(d), x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

weights = torch.cat([p.detach().flatten() for p in model.parameters()])
mean = weights.clone()
torch.distributed.all_reduce(mean)
assert torch.allclose(weights, mean / processes, atol=1e-6)  # every process has the same weights
if rank == 0:
    print(f"{processes} processes, {step + 1} steps, the same {len(weights)} weights")
torch.distributed.destroy_process_group()
"""


def torchrun(*words):
    """Run a program in two processes on this machine, as the command torchrun does, and return what it prints."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two processes share the cores
    ran = subprocess.run([*launcher, *map(str, words)], env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stdout + ran.stderr)
    return ran.stdout.strip()


with tempfile.TemporaryDirectory() as directory:
    program = Path(directory, "loop.py")
    program.write_text(LOOP, encoding="utf-8")
    printed = torchrun(program)
print(printed)
assert printed.startswith("2 processes, 20 steps")

# %%
# At the command line this is ``torchrun --standalone --nproc-per-node 2 loop.py``.
#
# ``jfbfast train`` in several processes
# --------------------------------------
#
# The command does all of this itself, and takes care of checkpoints, validation and signals. The processes share each
# batch, so ``--batch-size`` is for all of them together.
#
# .. code-block:: bash
#
#    torchrun --standalone --nproc-per-node 4 -m jfbfast train PHOTOGRAPHS --out run --precision bf16
#
# If a process dies, the others end with a sentence that names the last saved step, and ``--resume`` goes on from there.
# With ``--max-restarts 3``, torchrun starts them again, and they go on by themselves.
#
# SLURM
# -----
#
# Under SLURM, start one torchrun on each machine, and let it start a process for each GPU. This script is
# ``docs/training/several_machines.sh`` in the repository, without its comments. ``--signal`` asks for two minutes'
# notice before the time is over, in which ``train`` saves its state. Submitted again, the job goes on.
#
# .. code-block:: bash
#
#    #!/bin/bash
#    #SBATCH --nodes=2
#    #SBATCH --ntasks-per-node=1
#    #SBATCH --gpus-per-node=4
#    #SBATCH --cpus-per-task=32
#    #SBATCH --time=12:00:00
#    #SBATCH --signal=TERM@120
#    set -euo pipefail
#
#    photographs=$1
#    run=$2
#    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
#    resume=()
#    if [ -e "$run/config.yaml" ]; then
#        resume=(--resume)
#    fi
#
#    srun torchrun \
#        --nnodes "$SLURM_NNODES" --nproc-per-node 4 --max-restarts 3 \
#        --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
#        -m jfbfast train "$photographs" --out "$run" --batch-size 64 "${resume[@]}"
#
# The folder of the run and the photographs must be visible to all machines.
#
# A folder of photographs
# -----------------------
#
# Restoring needs no connection between the photographs, so each goes to the next process that is free. With
# ``--skip-existing``, the same command goes on with a folder that was interrupted. A file appears only when it is
# whole.

with tempfile.TemporaryDirectory() as directory:
    folder, results = Path(directory, "holiday"), Path(directory, "restored")
    folder.mkdir()
    results.mkdir()
    for number in range(4):
        sharp = torch.from_numpy(skimage.data.coffee()[:96, 100 * number : 100 * number + 96]).permute(2, 0, 1) / 255
        blurred = jfbfast.GaussianBlur(sigma=1.2, padding_mode="valid")(sharp[None])[0]
        write_photograph(folder / f"{number}.png", Photograph(blurred, None, np.dtype("uint8")))
    words = ["-m", "jfbfast", "restore", folder, "--sigma", "1.2", "--out", results, "--skip-existing", "--quiet"]
    torchrun(*words)
    names = sorted(path.name for path in results.iterdir())
    gains = [
        float(read_photograph(results / name).pixels.std() - read_photograph(folder / f"{number}.png").pixels.std())
        for number, name in enumerate(names)
    ]
print("restored:", ", ".join(names))
assert len(names) == 4
assert min(gains) > 0  # each has more contrast than its blurred photograph

# %%
# With GPUs it is this, and under SLURM the script above with these last words:
#
# .. code-block:: bash
#
#    torchrun --standalone --nproc-per-node 4 --max-restarts 3 -m jfbfast restore PHOTOGRAPHS \
#        --sigma auto --device cuda --out DIR --skip-existing
#
# Where to go on
# --------------
#
# - `Training <https://jfbfast.github.io/jfbfast/latest/training.html>`_ has the settings, and what happens when a
#   process or a machine dies.
# - `Performance <https://jfbfast.github.io/jfbfast/latest/performance.html>`_ tells what bounds a training step, and
#   how much memory it takes.
# - ``jfbfast bench gpu`` checks and measures everything on your GPU.
