#!/usr/bin/env bash
# Top-k targets, the plain way: what will it cost, dump, verify, two students at two temperatures, the report.
#   bash pipelines/topk_reference/run.sh [OUTPUT]      (SMALL=1: a few steps on little text)
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
config="$here/config.yaml"
mkdir -p "${1:-topk_reference-output}" && cd "${1:-topk_reference-output}"
text='train[:15%]'; held_out='train[96%:]'; steps=()
if [ -n "${SMALL:-}" ]; then text='train[:4%]'; held_out='train[97%:]'; steps=(--max-steps 2); fi

kdcache plan --config "$config" --split "$text" --pilot-sequences 16 --compare top_k:64 --compare top_k:16 "${steps[@]}"
kdcache dump-teacher --config "$config" --split "$text" --output train-cache
kdcache dump-teacher --config "$config" --split "$held_out" --output heldout-cache --targets hidden
kdcache verify train-cache --deep
kdcache init-student --config "$config" --output student-init
kdcache train-student --config "$config" --output student-labels --alpha 0 "${steps[@]}"
kdcache train-student --config "$config" --output student-t1 "${steps[@]}"
kdcache train-student --config "$config" --output student-t2 --temperature 2 "${steps[@]}"
kdcache evaluate --student student-t1 --baseline student-labels --teacher-cache heldout-cache --report report.html
kdcache evaluate --student student-t2 --baseline student-labels --teacher-cache heldout-cache --output results-t2.json
