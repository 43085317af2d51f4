#!/usr/bin/env bash
# The teacher answers prompts; students learn its words (SeqKD), its distributions, or both beside real text.
#   bash pipelines/response_distillation/run.sh [OUTPUT]      (SMALL=1: a few steps on little text)
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
config="$here/config.yaml"
mkdir -p "${1:-response_distillation-output}" && cd "${1:-response_distillation-output}"
text='train[:15%]'; held_out='train[96%:]'; steps=()
if [ -n "${SMALL:-}" ]; then text='train[:4%]'; held_out='train[97%:]'; steps=(--max-steps 2); fi
asked='train[:32]'; asked_held_out='train[32:]'
if [ -n "${SMALL:-}" ]; then asked='train[:4]'; asked_held_out='train[36:]'; fi

kdcache dump-teacher --config "$config" --split "$text" --output real-cache
kdcache generate --config "$config" --dataset "$here/../prompts.jsonl" --split "$asked" --output answers
kdcache generate --config "$config" --dataset "$here/../prompts.jsonl" --split "$asked_held_out" --output answers-heldout
kdcache dump-teacher --config "$config" --dataset answers-heldout --targets hidden --output heldout-cache
kdcache init-student --config "$config" --output student-init
kdcache train-student --config "$config" --cache answers --output student-words --alpha 0 "${steps[@]}"
kdcache train-student --config "$config" --cache answers --output student-targets "${steps[@]}"
kdcache train-student --config "$config" --cache answers --cache real-cache --mix teacher:0.7,real:0.3 --output student-mixed "${steps[@]}"
for student in targets mixed; do
  kdcache evaluate --config "$config" --student student-$student --baseline student-words --teacher-cache heldout-cache \
    --prompts "$here/../prompts.jsonl" --split "$asked_held_out" --report report-$student.html
done
