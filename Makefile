# raytier: `make` lists the commands. Everything is installed into .venv, nothing outside this directory.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
CONFIG ?= serve_configs/llm.yaml
# Empty: the port that CONFIG names.
PORT ?=
# Further arguments for pip and pytest.
PIP_ARGS ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# pip shows its progress to a person, and errors alone to a log.
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check $(if $(MAKE_TERMOUT),,--quiet --quiet) \
	--constraint constraints.txt $(PIP_ARGS)

export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help
help: ## this list
	@echo "make serve                  install what is missing, then serve the demo model on http://127.0.0.1:8000"
	@echo "make serve PORT=8010        the same on another port"
	@echo "make serve CONFIG=FILE      another application, for example serve_configs/llm-streamed.yaml"
	@echo "make test                   every check and every test; ARGS='-k planner' selects tests"
	@echo "make lint                   the checks alone: ruff, mypy, import-linter"
	@echo "make format                 let ruff format the code"
	@echo "make clean                  remove $(VENV) and the caches"
	@echo
	@echo "PYTHON=/path/to/python3     the interpreter that $(VENV) is made with (3.11 or newer)"
	@echo "PIP_ARGS='...'              further arguments for pip, for example a CPU-only torch from"
	@echo "                            --extra-index-url https://download.pytorch.org/whl/cpu"

# --- environment ------------------------------------------------------------------------------------------------------

# A PYTHON given on the command line that is not the one of .venv rebuilds it; the default never does.
ifeq ($(origin PYTHON),command line)
ifneq ($(PYTHON),$(shell cat $(VENV)/python-choice 2>/dev/null))
.PHONY: $(VENV)/python-choice
endif
endif

$(VENV)/python-choice:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). Install Python 3.11 or newer (Debian, Ubuntu: apt-get install python3 python3-venv), or choose one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "raytier needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1). Choose another: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make environments. On Debian and Ubuntu: apt-get install $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(if $(wildcard $@),--clear) $(VENV)
	@echo "$(PYTHON)" > $@

# A stamp is written only when pip succeeded; the project itself is installed editable, so its code needs no new install.
$(VENV)/installed: $(VENV)/python-choice pyproject.toml constraints.txt
	@echo "Installing raytier into $(VENV), versions as in constraints.txt (a few minutes the first time)"
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/python-choice pyproject.toml constraints.txt
	@echo "Installing raytier and its test tools into $(VENV), versions as in constraints.txt (a few minutes the first time)"
	@$(PIP_INSTALL) --editable '.[test]'
	@touch $(VENV)/installed $@

# --- serve ------------------------------------------------------------------------------------------------------------

# The YAML is the truth about the port; PORT=N serves a copy of it that differs in that line alone.
CONFIG_PORT := $(shell sed -n 's/^  port: *//p' $(CONFIG) 2>/dev/null)
SERVE_PORT = $(or $(PORT),$(CONFIG_PORT),8000)
SERVED_CONFIG = $(if $(filter-out $(CONFIG_PORT),$(SERVE_PORT)),$(VENV)/serve-$(SERVE_PORT).yaml,$(CONFIG))

.PHONY: serve
serve: $(VENV)/installed ## serve CONFIG until Ctrl-C
	@test -r $(CONFIG) || { echo "There is no $(CONFIG); ready-made ones: $$(ls serve_configs/*.yaml | tr '\n' ' ')" >&2; exit 1; }
	@reason=$$($(BIN)/python -c 'import socket; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("127.0.0.1", int("$(SERVE_PORT)")))' 2>&1) \
		|| { reason=$${reason##*Error: }; echo "Port $(SERVE_PORT) cannot be used ($${reason#\[*\] }). Choose another: make serve PORT=$(if $(filter 8010,$(SERVE_PORT)),8020,8010)" >&2; exit 1; }
	@test $(SERVED_CONFIG) = $(CONFIG) || sed 's/^  port: .*/  port: $(SERVE_PORT)/' $(CONFIG) > $(SERVED_CONFIG)
	@echo "serve run $(SERVED_CONFIG)    (Ctrl-C stops it, and the Ray that it started)"
	@echo
	@echo "When the log says that the application is ready, ask from another terminal:"
	@echo "  curl http://127.0.0.1:$(SERVE_PORT)/v1/chat/completions -H 'Content-Type: application/json' \\"
	@echo "    -d '{\"model\": \"demo\", \"messages\": [{\"role\": \"user\", \"content\": \"Who are you?\"}]}'"
	@echo "Ray dashboard: http://127.0.0.1:8265 (Ray names another port below if that one is taken);"
	@echo "  the token that it asks for: $(BIN)/ray get-auth-token"
	@echo
	@exec $(BIN)/serve run $(SERVED_CONFIG)

# --- checks -----------------------------------------------------------------------------------------------------------

.PHONY: lint
lint: $(VENV)/installed-test ## ruff, mypy, import-linter
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "ruff format would change files: run make format" >&2; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

.PHONY: test
test: lint ## every check, then every test
	@$(BIN)/python -m pytest $(ARGS)

.PHONY: format
format: $(VENV)/installed-test
	@$(BIN)/ruff check --quiet --fix --exit-zero .
	@$(BIN)/ruff format .

.PHONY: clean
clean:
	rm -rf .venv build dist raytier.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find raytier tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
