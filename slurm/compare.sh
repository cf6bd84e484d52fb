@{shebang}
@{directives}

# Written by `launcher submit slurm --sweep`: runs when all members of the sweep have ended.
set -eo pipefail
cd -- @{working_folder}
@{setup}
set -u

srun --export=ALL --nodes=1 --ntasks=1@{step_options} @{program} -m launcher compare @{run_dir}
