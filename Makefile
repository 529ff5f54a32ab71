# `make demo` and `make test` set up everything they need in .venv; nothing is installed outside it.
PYTHON ?= python3
# Pinned so that a fresh machine does what this one did; any torch >= 2.11 works.
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Idle OpenMP threads sleep: tests and builds share the cores.
export OMP_WAIT_POLICY ?= passive

# The Triton kernels on CPU tensors. Triton reads the variable once, hence a process of its own.
INTERPRETED := tests/test_ops.py tests/test_properties.py tests/test_triton_interpreted.py
# Minutes of ptxas in one file each: both cores share their cases.
BUDGET := tests/test_triton_budget.py tests/test_cuda_budget.py

# The CUDA sources compiled by g++ (csrc/cuda/device.cuh), once for each order of threads.
SEEDS := 0 1 2
# With the sanitizers one case of every kernel's path; python itself is not built with them.
SANITIZED := cuda and (odd or fp32_parameters or dropout or decode_padded or smoothing or all_kn)
# libstdc++ too: the sanitizer looks for its exceptions when it starts.
ASAN = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0

# With a GPU: kernels of this project only, each tensor an allocation of its own, so that what lies
# beyond one belongs to nobody.
SANITIZER ?= compute-sanitizer
CHECKED = PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --kernel-name kns=4cgpt \
  --report-api-errors no --error-exitcode 1

.PHONY: demo test test-cuda test-gpu cuda-host bench build check format clean

demo: build
	$(BIN)/cgpt-kernels demo

test: build cuda-host test-cuda
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(BUDGET:%=--ignore %) tests
	$(BIN)/python -m pytest -q -n 2 $(BUDGET)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 -k triton $(INTERPRETED)

test-cuda: cuda-host
	for seed in $(SEEDS); do CGPT_CUDA_HOST=1 CGPT_CUDA_HOST_SEED=$$seed \
	  $(BIN)/python -m pytest -q -n 2 -k cuda tests/test_ops.py || exit 1; done
	$(ASAN) CGPT_CUDA_HOST=asan CGPT_CUDA_HOST_SEED=1 $(BIN)/python -m pytest -q \
	  -k "$(SANITIZED)" tests/test_ops.py
	$(ASAN) CGPT_CUDA_HOST=asan CGPT_CUDA_HOST_SEED=1 $(BIN)/python -m pytest -q \
	  -k "rule or alignment" tests/test_cuda_decoder.py

# Everything natively, then a case of every kernel's path under each tool of compute-sanitizer.
test-gpu: .venv/installed
	@$(BIN)/python -c "import torch; torch.cuda.is_available() or exit( \
	  'make test-gpu: needs an NVIDIA GPU, torch.cuda.is_available() is False here')"
	$(MAKE) build cuda-host
	$(BIN)/python -m pytest -q -rs $(BUDGET:%=--ignore %) tests
	CGPT_CUDA_HOPPER=1 $(BIN)/python -m pytest -q -k cuda tests/test_ops.py tests/test_cuda_gpu.py
	@command -v $(SANITIZER) > /dev/null || { echo "make test-gpu: $(SANITIZER) is not on PATH: it" \
	  "comes with the CUDA toolkit; or pip install nvidia-cuda-sanitizer-api, SANITIZER=its path"; \
	  exit 1; }
	for tool in memcheck racecheck initcheck synccheck; do $(CHECKED) --tool $$tool \
	  $(BIN)/python -m pytest -q -k "$(SANITIZED)" tests/test_cuda_gpu.py || exit 1; done

cuda-host: .venv/installed
	CGPT_CUDA=host $(BIN)/python setup.py --quiet build_ext --inplace
	CGPT_CUDA=host_asan $(BIN)/python setup.py --quiet build_ext --inplace

bench: build
	$(BIN)/cgpt-kernels bench

# The first build goes the users' way, pip's isolated build; later ones are ninja's, incremental.
build: .venv/installed
	$(BIN)/python setup.py --quiet build_ext --inplace

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

clean:
	rm -rf build dist *.egg-info cgpt_kernels/*.so
