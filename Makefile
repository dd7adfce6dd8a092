# Every habit of the project by name. CI and pre-commit call these same targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CHECKED := app tests benchmarks deploy docs

.PHONY: install serve test lint lint-kubernetes format data evaluate overload gate-latency dashboard \
    kubernetes drift peers bench bench-gpu soak scaling

install: $(INSTALLED)

# Made anew only when what is to be installed has changed.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

serve: install
	$(BIN)/normgate serve

# First what computes, a process a core and one thread each; then what wants the machine for itself.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not alone" --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -m alone

lint: install
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/mypy --num-workers 2
	$(BIN)/hadolint Dockerfile
	@if command -v promtool > /dev/null; then \
	    promtool check config deploy/prometheus/prometheus.yml && \
	    promtool test rules deploy/prometheus/tests/*_test.yml; \
	else echo "promtool is not installed: the rules for Prometheus were not checked"; fi
	@if command -v kubectl > /dev/null; then $(BIN)/python -m deploy.kubernetes.check; \
	else echo "kubectl is not installed: the manifests for Kubernetes were not checked"; fi

# Checkov's policies on the rendered manifests. Its many dependencies stay out of the environment.
lint-kubernetes: install
	test -x build/checkov/bin/checkov || $(PYTHON) -m venv build/checkov
	build/checkov/bin/python -m pip install --quiet --disable-pip-version-check checkov
	$(BIN)/python -m deploy.kubernetes.check build/kubernetes
	build/checkov/bin/checkov --directory build/kubernetes --framework kubernetes --compact --quiet \
	    --skip-download

format: install
	$(BIN)/ruff format $(CHECKED)
	$(BIN)/ruff check --fix $(CHECKED)

# Grafana's dashboard, from its script.
dashboard: install
	$(BIN)/python -m deploy.grafana.dashboard

# The manifests that are made of other files under deploy/.
kubernetes: install
	$(BIN)/python -m deploy.kubernetes.generate

# The research images, unpacked into build/data.
data: install
	$(BIN)/python -m benchmarks.datasets

# The figures of the bundled model in the README, with a report in build/evaluation.
evaluate: data
	$(BIN)/normgate evaluate --bundle cifar10-resnet18 --id build/data/cifar10/test \
	    --train build/data/cifar10/train --codec jpeg75 --out build/evaluation/cifar10-resnet18 \
	    --ood svhn=build/data/svhn --ood textures=build/data/textures --ood mnist=build/data/mnist \
	    --ood tiny_imagenet32=build/data/tiny_imagenet32 \
	    --far svhn --far textures --far mnist --near tiny_imagenet32

# Three times more load than the server can carry; a goal met or missed.
overload: data
	$(BIN)/python -m benchmarks.overload

# How long Envoy would wait for the gate.
gate-latency: install
	$(BIN)/python -m benchmarks.gate

# A simulated week without drift in 200 runs, and how soon 10 % OOD images are found.
drift: data
	$(BIN)/python -m benchmarks.drift

# The servers that NormGate is compared with, each in an environment of its own.
peers: install
	$(BIN)/python -m benchmarks.peers.environments

# Every goal, met or missed; about an hour and a half on two cores. Needs wrk.
bench: data peers
	$(BIN)/python -m benchmarks.bench

# The same tables on the first GPU, where there is one.
bench-gpu: data peers
	$(BIN)/python -m benchmarks.bench --part cases --part gate --device cuda:0

# Memory under an hour of load.
soak: data
	$(BIN)/python -m benchmarks.soak

# One replica measured and modelled, a fleet's day simulated, cost and bottlenecks; about 7 minutes.
scaling: data
	$(BIN)/python -m benchmarks.scaling.replica
	$(BIN)/python -m benchmarks.scaling.day
	$(BIN)/python -m benchmarks.scaling.bottlenecks
