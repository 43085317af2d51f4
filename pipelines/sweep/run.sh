#!/usr/bin/env bash
# Many students from one cache: a table, a plot, and what the teacher's time would have cost each of them live.
#   bash pipelines/sweep/run.sh [OUTPUT]      (SMALL=1: a few steps on little text)
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
config="$here/config.yaml"
mkdir -p "${1:-sweep-output}" && cd "${1:-sweep-output}"
text='train[:15%]'; held_out='train[96%:]'; steps=()
if [ -n "${SMALL:-}" ]; then text='train[:4%]'; held_out='train[97%:]'; steps=(--max-steps 2); fi

kdcache dump-teacher --config "$config" --split "$text" --output train-cache
kdcache dump-teacher --config "$config" --split "$held_out" --output heldout-cache --targets hidden
kdcache init-student --config "$config" --output student-init
kdcache sweep --config "$config" --output students ${SMALL:+--train max_steps=2}
