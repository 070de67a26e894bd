#!/bin/bash
# Train on two machines with four GPUs each:  sbatch several_machines.sh PHOTOGRAPHS RUN
# Both folders must be visible to all machines. Submitted again with the same arguments, it goes on with the run.
#SBATCH --job-name=jfbfast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
set -euo pipefail

photographs=$1
run=$2
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
resume=()
if [ -e "$run/config.yaml" ]; then
    resume=(--resume)
fi

srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 4 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m jfbfast train "$photographs" --out "$run" --batch-size 64 "${resume[@]}"
# A folder of photographs is restored in the same way, by
#   -m jfbfast restore "$photographs" --sigma auto --device cuda --out "$restored" --skip-existing
