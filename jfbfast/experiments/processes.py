"""The processes of a run: torchrun's, or one alone, whatever else a scheduler has set."""

from __future__ import annotations

import os


def distributed() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """This process's place among torchrun's; 0 for one alone."""
    return int(os.environ["RANK"]) if distributed() else 0


def check_launch() -> None:
    """Raise ValueError where srun started several processes, each of which would train by itself."""
    tasks, place = (os.environ.get(f"SLURM_{name}", "") for name in ("STEP_NUM_TASKS", "PROCID"))
    if not distributed() and (tasks not in ("", "1") or place not in ("", "0")):
        raise ValueError(
            f"srun started {tasks or 'several'} processes, each of which would train by itself; "
            "start one a machine: srun --ntasks-per-node=1 torchrun … -m jfbfast train …"
        )
