#!/bin/bash
#SBATCH --job-name=quickstart
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-node=4
#SBATCH --chdir=/shared/runs/quickstart/slurm
#SBATCH --output=%A_%a.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --export=HOME,PATH,USER,LOGNAME,LANG,HF_HOME,HF_TOKEN,HF_HUB_OFFLINE
#SBATCH --array=0-2%2
#SBATCH --requeue

# Written by `launcher submit slurm`; slurm/README.md says what it does and why.
# Paths stand in single quotes, some with commas, and traps call the functions:
# shellcheck disable=SC2016,SC2054,SC2089,SC2090,SC2317
set -eo pipefail
cd -- /home/me/project

set -u # not before: what a site's modules define may read unset variables

members=(1-lr-1e-5 2-lr-2e-5 3-lr-4e-5)
run_dir=/shared/runs/quickstart/"${members[SLURM_ARRAY_TASK_ID]}"
job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
attempt=${SLURM_RESTART_COUNT:-0}
folder=$run_dir/slurm/$job.$attempt
driver='' asked=no

say() { printf '%(%F %T)T job %s attempt %s: %s\n' -1 "$job" "$attempt" "$*"; }
save() { asked=$1 && if [ -n "$driver" ]; then kill -USR1 "$driver" 2>/dev/null || true; fi; }
running() { kill -0 "$1" 2>/dev/null; }
pause() { sleep 1 & wait $! || true; } # unlike sleep, wait lets a trap run at once
failed() { [ -s "$folder/cause" ] || ! running "$nodes"; }
give_up() {
  say "$1: $(cat -- "$folder/cause" 2>/dev/null || echo "see $folder")" >&2
  kill -USR2 "$nodes" 2>/dev/null || true # Ray's sign to end; Slurm's own would take KillWait
  for _ in {1..10}; do running "$nodes" && pause; done
  exit 1
}

mkdir -p -- "$folder"
rm -f -- "$folder/address" "$folder/cause" "$run_dir/slurm/$job".*/token # of attempts whose node was lost
trap 'rm -f -- "$folder/token"' EXIT
trap 'save requeue' USR1 # time is nearly up: save and go back to the queue
trap 'save end' TERM     # cancelled, or Slurm itself requeues the job
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$folder/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token" RAY_USAGE_STATS_ENABLED=0

step=(srun --overlap --export=ALL --cpu-bind=none)
program=(apptainer exec --nv --bind /home/me/project --bind /shared/runs/quickstart --bind /tmp --bind /data:/data:ro --pwd /home/me/project '/images/tune lift.sif' python3)

say "starting Ray on $SLURM_JOB_NUM_NODES nodes: $SLURM_JOB_NODELIST"
"${step[@]}" --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
  --kill-on-bad-exit=0 --wait=30 --output="$folder/%N.log" \
  "${program[@]}" -m launcher.submit.node --folder "$folder" --head "$SLURMD_NODENAME" --node-folder /tmp &
nodes=$!
until [ -s "$folder/address" ] || failed || ((SECONDS > 600)); do pause; done
if [ ! -s "$folder/address" ]; then
  give_up "Ray did not start within 600 s"
fi

"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" \
  "${program[@]}" -m launcher run "$run_dir/slurm/config.yaml" --run-dir "$run_dir" \
  --set cluster.address="'$(cat -- "$folder/address")'" --set cluster.num_nodes="$SLURM_JOB_NUM_NODES" \
  --set cluster.wait_s=600 &
driver=$!
[ "$asked" = no ] || save "$asked"
while running "$driver" && ! failed; do pause; done
if running "$driver"; then
  give_up "Ray ended before the run"
fi
code=0
wait "$driver" || code=$?
kill -USR2 "$nodes" 2>/dev/null || true
for _ in {1..30}; do running "$nodes" && pause; done
rm -f -- "$folder/token"

# 75 is the run's "saved, start me again"; 138 is USR1 before the run could take it.
if { [ "$code" -eq 75 ] || [ "$code" -eq 138 ]; } && [ "$asked" != end ] && [ "$attempt" -lt 3 ]; then
  say "the run has saved; it goes back to the queue"
  trap - TERM
  scontrol requeue "$SLURM_JOB_ID" && sleep 300
fi
say "ended with exit code $code"
exit "$code"
