#!/usr/bin/env bash
# Rounds: the student writes, the teacher scores in a dump, the student trains on the round, a replay and real text.
#   bash pipelines/on_policy/run.sh [OUTPUT]      (SMALL=1: a few steps on little text)
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
config="$here/config.yaml"
mkdir -p "${1:-on_policy-output}" && cd "${1:-on_policy-output}"
text='train[:15%]'; held_out='train[96%:]'; steps=()
if [ -n "${SMALL:-}" ]; then text='train[:4%]'; held_out='train[97%:]'; steps=(--max-steps 2); fi
asked='train[:32]'; asked_held_out='train[32:]'
if [ -n "${SMALL:-}" ]; then asked='train[:4]'; asked_held_out='train[36:]'; fi

kdcache dump-teacher --config "$config" --split "$text" --output real-cache
kdcache init-student --config "$config" --output student-init
kdcache train-student --config "$config" --cache real-cache --output student-0 "${steps[@]}"
replay=()
for round in 1 2; do
  student="student-$((round - 1))"
  kdcache generate --config "$config" --teacher "$student" --dataset "$here/../prompts.jsonl" --split "$asked" --sample-seed "$round" \
    --top-k 1 --codec exact --output "rollouts-$round"
  kdcache dump-teacher --config "$config" --dataset "rollouts-$round" --output "scored-$round"
  replay+=(--cache "scored-$round" --rollout-cache "rollouts-$round")
  kdcache train-student --config "$config" --cache real-cache "${replay[@]}" --mix student:0.5,real:0.5 \
    --student "$student" --output "student-$round" --learning-rate 1e-3 --max-steps "${steps[1]:-15}"
done
kdcache train-student --config "$config" --loss minillm --alpha 0.5 --cache real-cache --student-cache scored-2 --rollout-cache rollouts-2 \
  --mix student:0.5,real:0.5 --student student-1 --output student-minillm --learning-rate 1e-3 --max-steps "${steps[1]:-15}"
kdcache generate --config "$config" --teacher student-2 --dataset "$here/../prompts.jsonl" --split "$asked_held_out" --top-k 1 --output own-text
kdcache dump-teacher --config "$config" --dataset own-text --targets hidden --output heldout-cache
kdcache evaluate --student student-2 --baseline student-0 --teacher-cache heldout-cache --report report.html
