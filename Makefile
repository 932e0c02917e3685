# Every target makes .venv and installs what it needs; the second time that takes a second.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
WORKERS ?= 2

.PHONY: help demo test test-all mutations mutate lint install gpu gpu-train bench kernels clean

help:
	@echo "make demo      train robustly on real digits with 2 workers, evaluate, write the report (minutes)"
	@echo "make test      the tests that CI runs"
	@echo "make test-all  also the slow ones"
	@echo "make mutations plant faults in the sources and see that the tests notice"
	@echo "make mutate    a sample of automatic mutants of the files that decide numbers; again to go on"
	@echo "make lint      ruff and mypy"
	@echo "make bench     benchmarks of this machine"
	@echo "make gpu       everything that needs a GPU, in one command"
	@echo "make gpu-train RECIPE=... DATA=... MINUTES=9 SET=key=value   train for some minutes, evaluate; again to go on"

$(STAMP): pyproject.toml setup.py
	@echo "== installing distributed-at into $(VENV) (torch, DeepSpeed, DALI: about 6 GB; 2 to 5 minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $(STAMP)
	@echo "== installed"

install: $(STAMP)

demo: $(STAMP)
	@$(BIN)/python -m distributed_at.demo --workers $(WORKERS)

# Two processes of one thread each, whole files to a process. The order of `test` is fixed; that of `test-all` is drawn,
# and the seed is printed first (`make test-all SEED=...` draws it again).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(STAMP)
	$(PYTEST) -q -p no:randomly -m "not slow and not gpu"

test-all: $(STAMP)
	HYPOTHESIS_PROFILE=explore $(PYTEST) $(if $(SEED),--randomly-seed=$(SEED)) -m "not gpu"

mutations: $(STAMP)
	$(BIN)/python -m tests.mutations

# Aside and without what the product has in versions of its own.
COSMIC_RAY := $(VENV)/cosmic-ray
$(COSMIC_RAY): $(STAMP)
	@$(BIN)/python -m pip install --quiet --no-deps --target $(COSMIC_RAY) cosmic-ray==8.7.0 parso==0.8.7 \
		stevedore==5.10.0 exit-codes==1.3.0 sqlalchemy==2.1.9 attrs==26.1.0 click==8.5.1 toml==0.10.2

mutate: $(STAMP) $(COSMIC_RAY)
	OMP_NUM_THREADS=1 nice -n 15 $(BIN)/python -m tests.mutations.sweep --tool $(COSMIC_RAY) $(if $(AGAIN),--again)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

kernels:
	$(MAKE) -C kernels

# Peers are installed aside and without their dependencies, some of which ask for old versions of ours.
PEERS := $(VENV)/peers
$(PEERS): $(STAMP)
	@$(BIN)/python -m pip install --quiet --no-deps --target $(PEERS) torchattacks==3.5.1 foolbox==3.3.4 eagerpy==0.30.0 \
		adversarial-robustness-toolbox==1.20.1 GitPython gitdb smmap

bench: $(STAMP) $(PEERS)
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.peers --peers $(PEERS)
	$(BIN)/python -m benchmarks.attack_ladder
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.engine_overhead

# These two install nothing: a GPU machine often has torch of its own and no network.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
MINUTES ?= 9
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu --minutes $(MINUTES)

gpu-train:
	@test -n "$(RECIPE)" || { echo "make gpu-train RECIPE=table.yaml#row DATA=folder [MINUTES=9] [SET='key=value ...']"; exit 2; }
	$(GPU_PYTHON) -m benchmarks.gpu_train "$(RECIPE)" $(SET) $(if $(DATA),--data "$(DATA)") --minutes $(MINUTES)

clean:
	rm -rf $(VENV) build *.egg-info
