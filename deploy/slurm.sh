#!/bin/bash
# A search on the nodes of a Slurm job, one Ray node on each. Submit it where `python` and `ray` are
# those of the environment, from a folder on a disk that all nodes share:
#     sbatch --nodes=5 --gpus-per-node=8 deploy/slurm.sh --space my_space.yaml resources.gpus_per_worker=1
# When the time is up, the search ends in order, the job is queued again, and the search goes on.
#SBATCH --job-name=nanovlm
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# exclusive: `ray symmetric-run` takes no node with another Ray on it, and ends all Ray of its user.
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=${nodes[0]}:6379
export RAY_AUTH_MODE=token RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))') # of this job alone
export RAY_AUTH_TOKEN
end=$(squeue --noheader --job "$SLURM_JOB_ID" --format %e)
seconds=$(($(date --date "$end" +%s) - $(date +%s) - 300)) # five minutes to end in order

code=0
srun ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    timeout "$seconds" python -m run_search --address "$address" --resume-if-exists "$@" || code=$?
if [ "$code" -eq 124 ]; then # from `timeout`
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
