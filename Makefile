# Two commands are enough on a fresh machine: `make demo` and `make test`. They need Python >= 3.11; a part of the tests
# needs a C and C++ compiler as well.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The tests start hundreds of Python processes; without bytecode each would compile the package again.
test slow truth: export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test truth lint slow bench bench-gpu bench-gpu-dry schemas model wheel clean help

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(STAMP) ## draw a picture with the embedded model: outputs/demo.png
	$(BIN)/dg-run --auto --prompt "a red circle on a blue background" --seed 7 --output outputs/demo.png
	@echo
	@echo "The picture is outputs/demo.png. It was made by this plan:"
	@$(BIN)/dg-run plan
	@echo
	@echo "Next, your own model (a directory in diffusers layout, or OWNER/MODEL on the hub):"
	@echo "  $(BIN)/dg-run --auto --model black-forest-labs/FLUX.1-schnell --prompt \"a lighthouse at dusk\""

test: $(STAMP) ## run the tests (about 8 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

slow: $(STAMP) ## run the checks that take long: every architecture and pair, environments, hundreds of pictures (hours)
	$(BIN)/python -m pytest -m slow

truth: $(STAMP) ## execute 2,000 runs on the counted device and hold them against what is predicted (about an hour)
	$(BIN)/python -m truth --cases 2000

lint: $(STAMP) ## ruff, mypy --strict, and whether generated files are fresh
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m tools.make_schemas --check
	$(BIN)/python -m tools.make_docs --check

bench: $(STAMP) ## print how long planning takes
	$(BIN)/python -m bench.startup

bench-gpu: $(STAMP) ## measure on the NVIDIA card that is here, for an hour, into outputs/gpu.jsonl (docs/benchmarks.md)
	$(BIN)/python -m bench.gpu run --minutes 60 --out outputs/gpu.jsonl
	$(BIN)/python -m bench.gpu report outputs/gpu.jsonl --write outputs/gpu.md

bench-gpu-dry: $(STAMP) ## the same without a card, on a device that counts bytes: it shows that the harness works
	$(BIN)/python -m bench.gpu run --dry --minutes 15 --out outputs/gpu-dry.jsonl
	$(BIN)/python -m bench.gpu report outputs/gpu-dry.jsonl --write outputs/gpu-dry.md

schemas: $(STAMP) ## regenerate schema/profile.schema.json and docs/compatibility.md from the optimizers' specs and the rules
	$(BIN)/python -m tools.make_schemas
	$(BIN)/python -m tools.make_docs

model: $(STAMP) ## train the embedded model again, from nothing, into build/tiny-flux (under an hour on 2 cores)
	$(BIN)/python -m tools.tiny_flux build --out build/tiny-flux --seed 0
	$(BIN)/python -m tools.tiny_flux refine build/tiny-flux --seed 0

wheel: $(STAMP) ## build dist/*.whl
	$(BIN)/python -m build --outdir dist

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist outputs .mypy_cache .ruff_cache .pytest_cache

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
