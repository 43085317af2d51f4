#!/usr/bin/env bash
# Targets drawn at random, unbiased: a quarter to a third of the bytes of top-k, the same gradient on average.
#   bash pipelines/sampled/run.sh [OUTPUT]      (SMALL=1: a few steps on little text)
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
config="$here/config.yaml"
mkdir -p "${1:-sampled-output}" && cd "${1:-sampled-output}"
text='train[:15%]'; held_out='train[96%:]'; steps=()
if [ -n "${SMALL:-}" ]; then text='train[:4%]'; held_out='train[97%:]'; steps=(--max-steps 2); fi

kdcache dump-teacher --config "$config" --split "$text" --output sampled-cache --targets sampled --num-draws 50
kdcache dump-teacher --config "$config" --split "$text" --output systematic-cache --targets systematic --num-draws 25
kdcache dump-teacher --config "$config" --split "$held_out" --output heldout-cache --targets hidden
kdcache inspect systematic-cache
kdcache init-student --config "$config" --output student-init
kdcache train-student --config "$config" --cache sampled-cache --output student-sampled "${steps[@]}"
kdcache train-student --config "$config" --cache systematic-cache --output student-systematic "${steps[@]}"
kdcache train-student --config "$config" --cache sampled-cache --output student-labels --alpha 0 "${steps[@]}"
kdcache evaluate --student student-sampled --baseline student-labels --teacher-cache heldout-cache --output results.json
kdcache evaluate --student student-systematic --baseline student-labels --teacher-cache heldout-cache --report report.html
