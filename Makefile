# make setup   the virtual environment .venv, with the exact versions of constraints.txt
# make demo    a whole night in minutes: synthetic images, or DATA=<folder with images/, masks/, splits.csv>
# make test    the tests; ARGS='-k tiles' picks some
# make faults  the tests that break things on purpose: stores, processes, images, disks; tests/FAULTS.md has the list
# make nights  the tests of whole nights on real servers: Prefect, a Ray cluster, an S3 store, all of them here
# make cluster, make cluster-down   those servers, to try; what they store is under cluster/
# make bench DATA=<dsb2018> MODEL=<trained model>   every number of the README's section Measured, anew; hours, alone
# make check   format, lint, types and import contracts
# Each does its own set-up, on a machine with Python 3.11 or later and make.

.PHONY: setup demo test faults nights cluster cluster-down bench bench-peers check format constraints clean
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first Python that is new enough and can make a virtual environment.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; \
	done)

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || \
		{ echo "No Python 3.11 or later with venv was found: install it (Debian: python3.11-venv), or say PYTHON=path" >&2; exit 1; }
	@echo "Installing into $(VENV): some minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The demo is the nightly flow with a small model; everything it makes is under demo/.
NIGHT := demo/$(if $(DATA),$(notdir $(abspath $(DATA))),synthetic)
LABELLED := $(if $(DATA),$(DATA),$(NIGHT)/data)

demo: $(STAMP) $(if $(DATA),,$(NIGHT)/data/splits.csv)
	@$(BIN)/python -m flows.nightly --config infra/recipes/demo.yaml \
		--data $(LABELLED) --input $(LABELLED)/images \
		--models $(NIGHT)/models --work $(NIGHT)/work --output $(NIGHT)/output

demo/synthetic/data/splits.csv: | $(STAMP)
	@$(BIN)/unetpp synth --out $(@D) --num 160 --seed 1

# Two files of tests at a time: half of them wait, for servers, processes and disks. A process of tests that dies fails the
# run at once: replaced, it may leave the run waiting for tests that nobody has.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --max-worker-restart 0

test: $(STAMP)
	@$(PYTEST) --ignore=tests/faults --ignore=tests/cluster $(ARGS)

faults: $(STAMP)
	@$(PYTEST) tests/faults $(ARGS)

nights: $(STAMP)
	@$(BIN)/python -m pytest tests/cluster $(ARGS)

cluster: $(STAMP)
	@$(BIN)/python -m infra.cluster up

cluster-down: $(STAMP)
	@$(BIN)/python -m infra.cluster down

# What others make of the same folder, in an environment beside ours: theirs wants a torch that is not ours.
PEERS := .venv-peers
RESULTS := tests/bench/results
BENCH = $(BIN)/python -m tests.bench

bench: $(STAMP) bench-peers
	@test -n "$(DATA)" && test -n "$(MODEL)" || \
		{ echo "Say DATA=<labelled set> and MODEL=<model folder that infra/recipes/nuclei_cpu.yaml trained>" >&2; exit 1; }
	@$(BENCH).engines --data $(DATA) --out $(RESULTS)/engines.json
	@$(BENCH).peers --data $(DATA) --peers $(PEERS) --out $(RESULTS)/peers.json
	@$(BENCH).pipe --data $(DATA) --out $(RESULTS)/pipe.json
	@$(BENCH).split --data $(DATA) --out $(RESULTS)/split.json
	@$(BENCH).cost --data $(DATA) --out $(RESULTS)/cost.json
	@$(BENCH).startup --data $(DATA) --against 48b6fc1 --out $(RESULTS)/startup.json
	@$(BENCH).frontier --data $(DATA) --model $(MODEL) --peers $(RESULTS)/peers.json --out $(RESULTS)/frontier.json
	@$(BENCH).tables $(RESULTS)

bench-peers: $(PEERS)/.installed

$(PEERS)/.installed: tests/bench/peers-requirements.txt | $(STAMP)
	@echo "Installing into $(PEERS)"
	@test -x $(PEERS)/bin/python || $(BIN)/python -m venv $(PEERS)
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$($(PEERS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth"
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	@touch $@

check: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

constraints: $(STAMP)
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
