#!/bin/bash
#SBATCH --job-name=quickstart-compare
#SBATCH --partition=cpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --chdir=/shared/runs/quickstart/slurm
#SBATCH --output=%j.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --export=HOME,PATH,USER,LOGNAME,LANG,HF_HOME,HF_TOKEN,HF_HUB_OFFLINE
#SBATCH --requeue

# Written by `launcher submit slurm --sweep`: runs when all members of the sweep have ended.
set -eo pipefail
cd -- /home/me/project

set -u

srun --export=ALL --nodes=1 --ntasks=1 apptainer exec --bind /home/me/project --bind /shared/runs/quickstart --bind /tmp --bind /data:/data:ro --pwd /home/me/project '/images/tune lift.sif' python3 -m launcher compare /shared/runs/quickstart
