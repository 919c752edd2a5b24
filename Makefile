# kvbus: small language models on small devices exchange KV caches over MQTT.
# A fresh machine with Python 3.11 or newer needs nothing but `make demo` or `make test`.

PYTHON ?= python3
# The torch to install, for preparing models on the laptop only. A CPU build is all that is needed; where pip would
# fetch a CUDA build, give the index of PyTorch's CPU wheels as well (pytorch.org, "Get Started", names it):
#   make demo TORCH_INDEX=URL
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
HOST ?=
AGENT ?=
BROKER ?=
CARD ?=
DATA ?=

.DEFAULT_GOAL := help

.PHONY: help
help:  ## Show this list.
	@grep -hE '^[a-z -]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'
	@echo; echo "  Options: PYTHON=python3.12, TORCH=torch==2.x, TORCH_INDEX=URL (see the Makefile), ARGS='...' for the command"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvbus needs Python 3.11 or newer; this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	@echo "installing torch (for preparing models; devices do without) ..."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"
	@echo "installing kvbus and what it needs ..."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[coordinator,export,entities,evaluate,flash,replay,dev]"
	@touch $@

.PHONY: install
install: $(STAMP)  ## Set up .venv with everything (the other targets do it by themselves).

.PHONY: prepare-model
prepare-model: $(STAMP)  ## Export the default model into a bundle; found in the cache the second time.
	$(BIN)/python -m scripts.prepare_model $(ARGS)

.PHONY: demo
demo: $(STAMP)  ## Run the main job: broker, coordinator, three agents, shaped links, questions. ARGS='--keep' stays up.
	$(BIN)/python -m scripts.prepare_model
	$(BIN)/python -m scripts.demo $(ARGS)

.PHONY: test
test: $(STAMP)  ## Run the tests (all but the slow ones).
	$(BIN)/python -m scripts.prepare_model
	$(BIN)/python -m scripts.prepare_model --weights fp32
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

.PHONY: test-slow
test-slow: $(STAMP)  ## Run the slow tests.
	$(BIN)/python -m scripts.prepare_model
	$(BIN)/python -m scripts.prepare_model --weights fp32
	$(BIN)/python -m pytest -m slow $(ARGS)

.PHONY: check
check: $(STAMP)  ## Check style and types.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

.PHONY: evaluate
evaluate: $(STAMP)  ## Ask the model questions over every way of compressing (slow). DATA='FILE ...', else its own 25.
	$(BIN)/python -m scripts.prepare_model
	$(BIN)/python -m scripts.evaluate $(DATA) $(ARGS)

.PHONY: bench
bench: $(STAMP)  ## Measure codec, bus and links on this machine; tables under build/bench/.
	$(BIN)/python -m scripts.prepare_model
	$(BIN)/python -m scripts.bench $(ARGS)

.PHONY: policies
policies: $(STAMP)  ## Compute what planning is worth, without any model; figures under build/policies/.
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.policies $(ARGS)

.PHONY: replay
replay: $(STAMP)  ## Replay traces under every policy in virtual time; tables under build/replay/. No model needed.
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.replay run $(ARGS)

.PHONY: replay-live
replay-live: $(STAMP)  ## The same with real agents on emulated links, beside their twins in virtual time (12 minutes).
	$(BIN)/python -m scripts.prepare_model
	$(BIN)/python -m scripts.replay live $(ARGS)

.PHONY: report
report: $(STAMP)  ## Make a page of the last replay, build/replay/report.html; runs one if there is none.
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.replay report $(ARGS)

.PHONY: device-bundle
device-bundle: $(STAMP)  ## Build what devices need, signed, to be flashed without internet; under build/device-bundle/.
	$(BIN)/python -m scripts.prepare_model
	$(BIN)/python -m scripts.flash bundle $(ARGS)

.PHONY: flash
flash: $(STAMP)  ## Put an agent on a device over SSH: HOST=pi@raspberrypi.local, several in quotes. ARGS=--dry-run looks.
	@test -n "$(HOST)" || { echo "say which device: make flash HOST=pi@raspberrypi.local"; exit 2; }
	$(BIN)/python -m scripts.prepare_model
	$(BIN)/python -m scripts.flash flash $(HOST) $(if $(AGENT),--agent $(AGENT)) $(if $(BROKER),--broker $(BROKER)) $(ARGS)

.PHONY: image
image: $(STAMP)  ## Have a card install an agent at its first start: CARD=/media/me/bootfs (or an .img) AGENT= BROKER=.
	@test -n "$(CARD)" -a -n "$(AGENT)" -a -n "$(BROKER)" || { echo "say which card, agent and broker: make image CARD=/media/me/bootfs AGENT=kitchen BROKER=192.168.1.10"; exit 2; }
	$(BIN)/python -m scripts.prepare_model
	$(BIN)/python -m scripts.flash image $(CARD) --agent $(AGENT) --broker $(BROKER) $(ARGS)

.PHONY: flash-status flash-logs flash-rollback unflash
flash-status flash-logs flash-rollback unflash: $(STAMP)  ## The same devices: how they are, their log, back, off again.
	@test -n "$(HOST)" || { echo "say which device: make $@ HOST=pi@raspberrypi.local"; exit 2; }
	$(BIN)/python -m scripts.flash $(patsubst flash-%,%,$@) $(HOST) $(ARGS)

.PHONY: clean
clean:  ## Remove .venv, build/ and caches of tools (not the model cache, see README).
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
