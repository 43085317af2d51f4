#!/usr/bin/env bash
# Distil first, then fine-tune on task data: two stages, one command line.
#   bash pipelines/two_stage/run.sh [OUTPUT]      (SMALL=1: a few steps on little text)
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
config="$here/config.yaml"
mkdir -p "${1:-two_stage-output}" && cd "${1:-two_stage-output}"
text='train[:15%]'; held_out='train[96%:]'; steps=()
if [ -n "${SMALL:-}" ]; then text='train[:4%]'; held_out='train[97%:]'; steps=(--max-steps 2); fi
asked='train[:32]'; asked_held_out='train[32:]'
if [ -n "${SMALL:-}" ]; then asked='train[:4]'; asked_held_out='train[36:]'; fi

kdcache dump-teacher --config "$config" --split "$text" --output real-cache
kdcache generate --config "$config" --dataset "$here/../prompts.jsonl" --split "$asked" --output task
kdcache generate --config "$config" --dataset "$here/../prompts.jsonl" --split "$asked_held_out" --output task-heldout
kdcache dump-teacher --config "$config" --dataset task-heldout --targets hidden --output heldout-cache
kdcache init-student --config "$config" --output student-init
kdcache train-student --config "$config" --output student "${steps[@]}" --then "cache=task alpha=0 learning_rate=1e-3 max_steps=${steps[1]:-20}"
kdcache evaluate --student student --baseline student/stage-1 --teacher-cache heldout-cache --report report.html
