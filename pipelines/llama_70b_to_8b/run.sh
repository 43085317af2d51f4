#!/usr/bin/env bash
# Llama 3.1 70B to 8B. Without LAUNCH a dry run: memory, bytes and hours, from the two configs alone.
#   bash pipelines/llama_70b_to_8b/run.sh [OUTPUT]
#   LAUNCH=torchrun bash pipelines/llama_70b_to_8b/run.sh OUTPUT      (a node of 8 GPUs; of several, on each: NNODES, NODE_RANK, RDZV=HOST:PORT)
#   LAUNCH=srun sbatch --nodes 4 --gpus-per-node 8 --exclusive --mem 0 pipelines/llama_70b_to_8b/run.sh OUTPUT
set -euo pipefail
# sbatch runs a copy of this file, from a folder of its own: Slurm is asked where it was.
script="$0"
[ -f "$(dirname "$0")/config.yaml" ] || script="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')"
here="$(cd "$(dirname "$script")" && pwd)"
config="$here/config.yaml"
mkdir -p "${1:-llama_70b_to_8b-output}" && cd "${1:-llama_70b_to_8b-output}"

kdcache plan --config "$config" --teacher-config "$here/llama-3.1-70b" --student-config "$here/llama-3.1-8b"

# Workers claim shards and need no rendezvous; each sees the two GPUs of its teacher. All read the pilot: one alone would take as long.
dump() {
  local pids=() failed=0
  case "${LAUNCH:-}" in
    torchrun) for gpus in 0,1 2,3 4,5 6,7; do CUDA_VISIBLE_DEVICES=$gpus kdcache dump-teacher --config "$config" "$@" & pids+=($!); done
              for pid in "${pids[@]}"; do wait "$pid" || failed=1; done; return $failed ;;
    srun) srun --ntasks-per-node 4 --gpus-per-task 2 kdcache dump-teacher --config "$config" "$@" ;;
  esac
}
train() {
  case "${LAUNCH:-}" in
    torchrun) torchrun --nnodes "${NNODES:-1}" --nproc-per-node 8 ${RDZV:+--rdzv-backend c10d --rdzv-endpoint "$RDZV"} -m kdcache train-student "$@" ;;
    srun) srun --ntasks-per-node 1 bash -c 'torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-backend c10d \
            --rdzv-endpoint "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1):29500" -m kdcache train-student "$@"' - "$@" ;;
  esac
}
dump --split 'train[:-1000]' --output train-cache
dump --split 'train[-1000:]' --output heldout-cache        # a thousand documents: about a million tokens
train --config "$config" --output student
[ -z "${LAUNCH:-}" ] || [ "${NODE_RANK:-0}" != 0 ] || kdcache evaluate --student student --baseline meta-llama/Llama-3.1-8B --teacher-cache heldout-cache --report report.html
