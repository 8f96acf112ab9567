# `make help` lists the commands. Needs Python 3.11+ and make; everything else goes into .venv.
PYTHON ?= python3
PRESET ?=
HUBS ?=
SEEDS ?= 1000
WORKERS ?= 4
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# A process needs half a second more to start where it may not keep what it has compiled, and a load test has five.
unexport PYTHONDONTWRITEBYTECODE

# Ctrl-C goes to make, to this shell and to the command alike. The shell waits for the command, and calls what Ctrl-C
# has ended no error: make then ends by the signal itself, without "*** Error 130". SIGTERM is passed on.
run = ended=; trap 'ended=1' INT; trap 'ended=1; kill $$pid' TERM; \
	$(1) & pid=$$!; \
	until wait $$pid; code=$$?; ! kill -0 $$pid 2> /dev/null; do :; done; \
	test -n "$$ended" || exit $$code

# pip is silent for half a minute or more: a dot a second says that it works.
pip = printf '%s ' '$(1)'; (while sleep 1; do printf .; done) & dots=$$!; \
	trap 'kill $$dots; echo' EXIT; trap 'exit 130' INT; \
	python -m pip install --quiet --disable-pip-version-check --editable '$(2)'
DEV := .[all,dev]

.PHONY: help loadtest start test test-fast lint fuzz simulate chaos proxies soak bench scale clean

help:
	@echo "make loadtest   one load test; PRESET=burst, fanout or smoke for another one, HUBS=4 for more hubs. Exit code 1: a limit is broken"
	@echo "make start      the system to watch: redis, hub, publisher, subscriber; HUBS=4 for more hubs on its port; Ctrl-C ends it"
	@echo "make test       all tests, in parallel; WORKERS=2 for fewer processes"
	@echo "make test-fast  those that need no processes and no patience"
	@echo "make lint       ruff and mypy"
	@echo "make fuzz       arbitrary input for everything that reads a stranger's bytes; EXAMPLES=50000 for more"
	@echo "make simulate   whole systems on virtual time, with faults; SEEDS=5000 for more, SEEDS=70-79 for these"
	@echo "make chaos      real processes, links and a real Redis, with faults; MINUTES=30 for longer, SEED=7 for this one"
	@echo "make proxies    5,000 subscribers behind nginx and HAProxy, hubs drained, killed, restarted; CLIENTS=1000 for fewer"
	@echo "make soak       ten minutes of churn: does memory grow, is anything lost? MINUTES=60 for longer"
	@echo "make bench      speed and memory against other hubs (needs gcc; about 20 minutes)"
	@echo "make scale      what 1,000 hubs would do, by costs that were measured; WHAT=check holds them against this machine"
	@echo "Each installs what it needs into $(VENV); for the commands in a terminal: . $(VENV)/bin/activate"

# Both have to say the same, or the hubs end with 78.
HUBS_ARE = $(if $(HUBS),BROADCASTER_HUB__PROCESSES=$(HUBS) )
HUBS_START = $(if $(HUBS), -c hub=$(HUBS))

# make ends with 2 whatever a recipe ends with, and says "*** Error 1". Only in question mode (-q, in which no recipe is
# run but those with +) a 1 stays a 1, without a word: so ends a load test that breaks a limit. Elsewhere (make 3.81, or
# with other targets in one call) it is a 2.
LOADTEST = $(call run,$(if $(PRESET),BROADCASTER_PRESET=$(PRESET) )$(HUBS_ARE)honcho -f Procfile.loadtest start$(HUBS_START))
ifeq ($(MAKECMDGOALS)$(findstring n,$(firstword -$(MAKEFLAGS))),loadtest)
MAKEFLAGS := -q $(MAKEFLAGS)
loadtest:
	+@MAKEFLAGS= $(MAKE) --no-print-directory $(VENV)/installed
	+@$(LOADTEST)
else
loadtest: $(VENV)/installed
	@$(LOADTEST)
endif

start: $(VENV)/installed
	@$(call run,$(HUBS_ARE)honcho start$(HUBS_START))

test: $(VENV)/installed-dev
	@python -m pytest -q -n $(WORKERS) --dist worksteal

test-fast: $(VENV)/installed-dev
	@python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow"

lint: $(VENV)/installed-dev
	@ruff check .
	@ruff format --check .
	@mypy

fuzz: $(VENV)/installed-dev
	@FUZZ_EXAMPLES=$(or $(EXAMPLES),5000) python -m pytest -q -n $(WORKERS) --dist worksteal --timeout 3600 tests/fuzz

simulate: $(VENV)/installed-dev
	@python -m tests.simulation $(SEEDS)

chaos: $(VENV)/installed-dev
	@python -m tests.chaos $(if $(SEED),--seed $(SEED),--minutes $(or $(MINUTES),10))

proxies: $(VENV)/installed-dev
	@PROXY_CLIENTS=$(or $(CLIENTS),5000) REQUIRE_REAL_CLIENTS=1 python -m pytest -q tests/clients/test_proxies.py

soak: $(VENV)/installed-dev
	@python -m tests.soak --minutes $(or $(MINUTES),10)

bench: $(VENV)/installed-dev
	@python -m tests.bench $(ROWS)

scale: $(VENV)/installed-dev
	@python -m tests.scale $(WHAT)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(call pip,installing into $(VENV),.[all])
	@touch $@

$(VENV)/installed-dev: pyproject.toml $(VENV)/installed
	@$(call pip,installing what the tests need,$(DEV))
	@touch $@
