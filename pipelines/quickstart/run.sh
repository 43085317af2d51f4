#!/usr/bin/env bash
# Phase 1 once, phase 2 twice: a student from labels only and one from the cache, equal in all else.
#   bash pipelines/quickstart/run.sh [OUTPUT]
set -euo pipefail
config="$(cd "$(dirname "$0")" && pwd)/config.yaml"
mkdir -p "${1:-demo-output}" && cd "${1:-demo-output}"

echo "== phase 1: the teacher reads the text once =="
kdcache dump-teacher --config "$config" --split 'train[:90%]' --output train-cache
kdcache dump-teacher --config "$config" --split 'train[90%:]' --output heldout-cache --targets hidden
kdcache inspect train-cache

echo "== phase 2: two students from the cache, the teacher is gone =="
kdcache init-student --config "$config" --output student-init
kdcache train-student --config "$config" --output student-labels --alpha 0
kdcache train-student --config "$config" --output student-distilled --alpha 0.9

echo "== what that bought, on text that neither student saw =="
kdcache evaluate --student student-distilled --baseline student-labels --teacher-cache heldout-cache --output results.json --report report.html

cat <<'NEXT'

Next, with your own models:
  kdcache dump-teacher  --teacher YOUR_TEACHER --dataset YOUR_DATA --output cache
  kdcache init-student  --from YOUR_TEACHER --layers 8 --output student-init
  kdcache train-student --cache cache --student student-init --output student --temperature 2 --alpha 0.5
  kdcache inspect demo-output/train-cache --sequence 0
NEXT
