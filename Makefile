# Works on a bare Debian or Ubuntu with Python 3.11+ and pip, as root and as an ordinary user.
.DEFAULT_GOAL := help
SHELL := /bin/sh

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first interpreter that is new enough; `make PYTHON=...` overrides.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)

# The caller's own settings for pip's target must not lead it out of .venv.
PIP_SETTINGS := export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore; \
	unset PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV PYTHONPATH PYTHONHOME

# Two workers: each may run PostgreSQL servers of its own.
PYTEST := $(BIN)/python -m pytest
WORKERS ?= 2

.PHONY: help install demo test test-all test-fault lint format lock bench bench-peers bench-repair bench-drills bench-exactness bench-kills bench-repair-kills bench-damage bench-pages bench-table bench-history bench-round-trip bench-matrix clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 14

install: $(STAMP) ## make .venv with everything in it

# Where ensurepip is missing (Debian without python3-venv) the system's pip fills the environment
# from outside. Each stamp comes last, so an interrupted install starts anew.
$(VENV)/.dependencies: requirements.lock
	@test -n "$(PYTHON)" || { echo "Knockwood needs Python 3.11 or newer; none was found" >&2; exit 3; }
	@umask 022; set -e; $(PIP_SETTINGS); \
	if $(PYTHON) -c 'import ensurepip' 2>/dev/null && $(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1; then \
		pip="$(BIN)/python -m pip"; \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1 && $(PYTHON) -m venv --clear --without-pip $(VENV); then \
		pip="$(PYTHON) -m pip --python $(BIN)/python"; \
	else \
		echo "cannot make a virtual environment with $(PYTHON); install python3-venv or python3-pip" >&2; \
		exit 3; \
	fi; \
	echo "installing the locked dependencies into $(VENV)"; \
	$$pip install --quiet --require-hashes --only-binary :all: -r requirements.lock; \
	touch $@

$(STAMP): $(VENV)/.dependencies pyproject.toml
	@umask 022; set -e; $(PIP_SETTINGS); \
	if $(BIN)/python -c 'import pip' 2>/dev/null; then pip="$(BIN)/python -m pip"; \
	else pip="$(PYTHON) -m pip --python $(BIN)/python"; fi; \
	$$pip install --quiet --no-deps --no-build-isolation --no-index --editable .; \
	touch $@

demo: install ## two outages on a real server under load, found and undone
	@exec $(BIN)/knockwood drill run corrupt-table rogue-script --orders 20000

test: install ## unit, PostgreSQL and documentation tests, without the slow ones
	@exec $(PYTEST) -n $(WORKERS) -m "not slow" $(wildcard tests/unit tests/postgres tests/docs)

test-all: install ## every test, faults and slow ones too
	@exec $(PYTEST) -n $(WORKERS) tests

test-fault: install ## the fault tests without the slow ones: kills, hangs, full disks, losses
	@exec $(PYTEST) -n $(WORKERS) -m "not slow" tests/fault

lint: install ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## renew requirements.lock (needs uv)
	uv pip compile --quiet --upgrade --universal --all-extras --generate-hashes --no-header \
		-o requirements.lock pyproject.toml > /dev/null

bench: install ## speed, as ratios measured in one run
	@exec $(BIN)/python bench/run.py

bench-peers: install ## the gap test, beside other backup tools
	@exec $(BIN)/python bench/peers.py

bench-drills: install ## every drill with 20 seeds
	@exec $(BIN)/python bench/drills.py

bench-repair: install ## repairs beside whole restores of the same database
	@exec $(BIN)/python bench/repair_speed.py

bench-damage: install ## every kind of damage done to a real cluster, and what found it
	@exec $(BIN)/python bench/damage_table.py

bench-table: install ## one table brought back out of ever larger databases
	@exec $(BIN)/python bench/table_restore.py

bench-pages: install ## random damage to pages under load, mended and compared
	@exec $(BIN)/python bench/page_damage.py

bench-exactness: install ## proofs in a row under writers, and one changed byte
	@exec $(BIN)/python bench/exactness.py

bench-kills: install ## kill -9 at every step of every command, and of the server beneath
	@exec $(BIN)/python bench/kill_sweep.py

bench-repair-kills: install ## kill -9 at every step of every repair, then resumed or rolled back
	@exec $(BIN)/python bench/repair_kills.py

bench-history: install ## how fast the archive is indexed, and its log asked
	@exec $(BIN)/python bench/history_speed.py

bench-round-trip: install ## random transactions on every built-in type, reverted, and the reverts reverted
	@exec $(BIN)/python bench/round_trip.py

bench-matrix: install ## culprits of every kind on every version: reverted exactly, or refused exactly
	@exec $(BIN)/python bench/culprit_matrix.py

clean: ## remove what the targets made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
