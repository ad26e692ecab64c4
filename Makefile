# Everything a developer needs, from a bare checkout. Each target first installs what is missing.

UV ?= uv
COMPILE = $(UV) pip compile pyproject.toml --quiet --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-annotate --custom-compile-command "make lock" $(ARGS)

.PHONY: help demo test unit-trial check chaos chaos-teeth bench bench-docs peers format settings lock wheel clean setup \
	setup-python setup-servers
.DEFAULT_GOAL := help

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: setup-servers  ## Show the service at work with servers of its own (KEEP=1: until Ctrl-C)
	@.venv/bin/retry-scheduler demo $(if $(KEEP),--keep)

test: setup  ## Run all tests (ARGS="-k name" for some)
	@scripts/test $(ARGS)

unit-trial: setup  ## Run the systemd unit under a real systemd in namespaces; as root, a minute and a half
	@.venv/bin/python -m pytest -q -s tests/trial_unit.py $(ARGS)

check: setup-python  ## Check format, lint, types, layers, dependencies and file lengths
	@scripts/check

bench: setup-servers  ## Measure speed and lateness (ARGS=--all: beside yardsticks, 35 minutes; ARGS=--help)
	@.venv/bin/python -m benchmarks.suite $(ARGS)

chaos: setup-servers  ## Break everything for MINUTES=5 and check what became of every message (SEED= repeats a run)
	@.venv/bin/python -m chaos --minutes $(or $(MINUTES),5) $(if $(SEED),--seed $(SEED))

chaos-teeth: setup-servers  ## Run the chaos test against fifteen broken builds: it must catch each
	@.venv/bin/python -m chaos.teeth $(ARGS)

bench-docs: setup-python  ## Write docs/performance.md and its pictures from benchmarks/results/latest.json
	@.venv/bin/python -m benchmarks.page

wheel: setup-python  ## Build dist/retry_scheduler-*.whl, for docs/deployment.md
	@.venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-input \
		--no-deps --no-build-isolation --no-index --wheel-dir dist .

peers:  ## Install what bench compares the service with into .venv-peers (PgQueuer, Celery)
	@scripts/setup peers

format: setup-python  ## Format the code, and repair what the linter can repair
	@.venv/bin/ruff format --quiet .
	@.venv/bin/ruff check --quiet --fix .

settings: setup-python  ## Write .env.example and docs/settings.md from the settings
	@.venv/bin/python scripts/settings_reference.py

lock:  ## Resolve the dependencies anew into requirements/*.lock (ARGS=--upgrade for newer versions)
	@$(COMPILE) --output-file requirements/runtime.lock
	@$(COMPILE) --extra demo --extra tracing --group dev --output-file requirements/dev.lock
	@$(COMPILE) --extra tracing --output-file requirements/tracing.lock
	@$(COMPILE) --group peers --output-file requirements/peers.lock

clean:  ## Remove .venv and everything else that can be made again
	@rm -rf .venv .venv-peers .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup:
	@scripts/setup

setup-python:
	@scripts/setup python

setup-servers:
	@scripts/setup python rabbitmq
