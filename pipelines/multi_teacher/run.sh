#!/usr/bin/env bash
# Two teachers, one after the other in memory: a mixture of two caches, and an average of logits in one.
#   bash pipelines/multi_teacher/run.sh [OUTPUT]      (SMALL=1: a few steps on little text)
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
config="$here/config.yaml"
mkdir -p "${1:-multi_teacher-output}" && cd "${1:-multi_teacher-output}"
text='train[:15%]'; held_out='train[96%:]'; steps=()
if [ -n "${SMALL:-}" ]; then text='train[:4%]'; held_out='train[97%:]'; steps=(--max-steps 2); fi

kdcache init-student --config "$config" --layers 27 --output second-teacher   # stands for another teacher with the same tokenizer
kdcache dump-teacher --config "$config" --split "$text" --output first-cache
kdcache dump-teacher --config "$config" --teacher second-teacher --dataset first-cache --output second-cache
kdcache dump-teacher --config "$config" --teacher second-teacher --dataset first-cache --targets hidden --output second-hidden
kdcache dump-teacher --config "$config" --dataset first-cache --average second-hidden:0.3 --output average-cache
kdcache dump-teacher --config "$config" --split "$held_out" --output heldout-cache --targets hidden
kdcache init-student --config "$config" --output student-init --shape hidden_size=256 --shape intermediate_size=688 \
  --shape num_hidden_layers=2 --shape num_attention_heads=4 --shape num_key_value_heads=2
kdcache train-student --config "$config" --cache first-cache:0.7 --cache second-cache:0.3 --output student-mixture "${steps[@]}"
kdcache train-student --config "$config" --cache average-cache --output student-average "${steps[@]}"
kdcache train-student --config "$config" --cache first-cache --output student-one "${steps[@]}"
kdcache evaluate --student student-mixture --baseline student-one --teacher-cache heldout-cache --report report.html
kdcache evaluate --student student-average --baseline student-one --teacher-cache heldout-cache --output results.json
