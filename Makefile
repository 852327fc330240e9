# Targets set up what they need. `make help` lists them.
#   MODEL=llada|dream  CHECKPOINT=dir|hub id  DTYPE=fp32|fp16|bf16  WEIGHTS=copy|link  HEAD=statistics|logits  OUT=dir  OVERWRITE=1  VERIFY=0
#   MASK_TOKEN=token, where config.json names none  ATTENTION=full|block_causal and BLOCK_LENGTH=n, where config.json does not say  PYTHON=python3.x
#   TARGET=ort-cpu: experts by ONNX Runtime's own operator
#   QUANTIZE=w8a8|int4|fp8|int8-sq  TARGET=ort-cpu|tensorrt (int4 has both)  DATA=file of prompts (and answers)  MATCH=exact|json  GATE=yes|no

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DTYPE ?= fp32
HEAD ?= statistics
WEIGHTS ?= copy
ENGINES ?= engines
DEMO := artifacts/llada-demo
PROMPTS := checkpoints/llada-demo/prompts.txt
DEMO_DATA := artifacts/demo-prompts.jsonl
MATCH ?= exact
GATE ?= yes
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo export engines test test-fast lint docs bench frontier gpu-report clean distclean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# what exporting and running need: no torch
$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[export,ort]'
	@touch $@

# what the tests need: PyTorch and transformers for the reference, TensorRT-RTX (which builds without a GPU), and the linters
$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -e '.[export,ort,reference,rtx-cu13,debug,kernels,serve,ray,eval,bench,dev]'
	@touch $@

demo: $(VENV)/.runtime ## export the shipped model, prove it, ask it, and measure what caches and parallel unmasking bring
	@echo "== 1. checkpoint -> artifact" && $(BIN)/python -m export --model llada --out $(DEMO) --overwrite --verify no
	@echo && echo "== 2. the artifact decodes as PyTorch did: same tokens, same order, same number of forwards"
	@$(BIN)/dllm-trt replay $(DEMO) checkpoints/llada-demo/cases.json
	@echo && echo "== 3. orders that the model never saw become plans" && head -3 $(PROMPTS) | $(BIN)/dllm-trt generate $(DEMO) -
	@echo && echo "== 4. one prompt, block by block" && $(BIN)/dllm-trt generate $(DEMO) --stream "$$(sed -n 4p $(PROMPTS))"
	@echo && echo "== 5. caches and parallel unmasking, side by side" && $(BIN)/dllm-trt bench $(DEMO) --prompts $(PROMPTS) --count 8

# in a variable, so that make shows the command on one line
EXPORT_ARGUMENTS = $(if $(or $(MODEL),$(CHECKPOINT)),$(if $(MODEL),--model $(MODEL)),--model llada) --dtype $(DTYPE) --head $(HEAD) \
  --weights $(WEIGHTS) $(if $(CHECKPOINT),--checkpoint '$(CHECKPOINT)') $(if $(OUT),--out '$(OUT)') --verify $(if $(filter 0,$(VERIFY)),no,auto) \
  $(if $(filter-out 0,$(OVERWRITE)),--overwrite) $(if $(MASK_TOKEN),--mask-token '$(MASK_TOKEN)') $(if $(ATTENTION),--attention $(ATTENTION)) \
  $(if $(BLOCK_LENGTH),--block-length $(BLOCK_LENGTH)) \
  $(if $(TARGET),--target $(TARGET)) $(if $(QUANTIZE),--quantize $(QUANTIZE) $(if $(DATA),--data '$(DATA)',$(if $(CHECKPOINT),,--data $(DEMO_DATA))) \
  --match $(if $(DATA)$(CHECKPOINT),$(MATCH),json) --gate $(GATE))

export: $(VENV)/.runtime $(if $(QUANTIZE),$(if $(DATA)$(CHECKPOINT),,$(DEMO_DATA))) ## checkpoint -> artifact: CHECKPOINT=dir|hub id (its config.json says the model), or MODEL=llada|dream alone for a demo [DTYPE=fp32|fp16|bf16] [OUT=dir] [OVERWRITE=1] [MASK_TOKEN=token] [ATTENTION=full|block_causal] [BLOCK_LENGTH=n] [WEIGHTS=copy|link] [HEAD=statistics|logits] [VERIFY=0] [TARGET=ort-cpu] [QUANTIZE=w8a8|int4|fp8|int8-sq DATA=file [TARGET=ort-cpu|tensorrt] [MATCH=exact|json] [GATE=yes|no]]
	$(BIN)/python -m export $(EXPORT_ARGUMENTS)

$(DEMO_DATA): | $(VENV)/.runtime
	@mkdir -p $(dir $@) && $(BIN)/python tools/demo_prompts.py --tuning $@ --count 100

engines: $(VENV)/.runtime ## artifact -> TensorRT engines, on the GPU that runs them: MODEL=llada|dream [OUT=dir] [ENGINES=dir] [BUILD='--max-batch 4']
	$(BIN)/dllm-trt build $(or $(OUT),artifacts/$(if $(filter dream,$(MODEL)),dream_tiny,llada-demo)) --out $(ENGINES) $(BUILD)

# what a contributor runs after each edit: policies, sequences, manifest and contract, routes of the server, an export and a decode of each family
FAST := tests/smoke tests/runtime/decoding/test_policies.py tests/runtime/decoding/test_adaptive.py tests/runtime/decoding/test_sampling.py \
  tests/runtime/decoding/test_refresh.py tests/runtime/artifact/test_manifest.py tests/runtime/artifact/test_check.py tests/docs/test_project.py

test-fast: $(VENV)/.dev ## the tests to run after each edit, in under a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(FAST)

test: $(VENV)/.dev ## the tests, on a CPU, in two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=15

lint: $(VENV)/.dev ## ruff, mypy, the directions of imports, the house rules (sizes, names)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/lint_house.py

docs: $(VENV)/.dev ## the documents as a site, on http://127.0.0.1:8000 (and again when they change)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench: $(VENV)/.dev ## a random 140 M LLaDA: caches, parallel unmasking, quantised, beside eager PyTorch; scaling with its roofline (about 30 minutes) [LLAMA_CPP=llama-diffusion-cli] [OFFICIAL=checkout of Fast-dLLM]
	$(BIN)/python benchmarks/cpu/system.py $(if $(LLAMA_CPP),--llama-cpp '$(LLAMA_CPP)') $(if $(OFFICIAL),--official '$(OFFICIAL)')
	$(BIN)/python benchmarks/reports/system.py

frontier: $(VENV)/.dev ## accuracy against tokens per forward: every policy, cache, refresh and block length on both shipped models (about 25 minutes)
	$(BIN)/python -m export --model llada --out $(DEMO) --overwrite --verify no
	$(BIN)/python -m export --model sdar --out artifacts/sdar-demo --overwrite --verify no
	$(BIN)/python benchmarks/cpu/frontier.py $(DEMO) artifacts/sdar-demo

gpu-report: ## parity and speed on this GPU, stage by stage, into benchmarks/results (no installs: PYTHON=one that has torch)
	$(if $(filter command,$(firstword $(origin PYTHON))),$(PYTHON),$(firstword $(wildcard $(BIN)/python) $(PYTHON))) benchmarks/gpu/report.py $(REPORT)

clean: ## remove caches and what was built; artifacts and the environment stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . \( -path './$(VENV)' -o -path ./artifacts \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove artifacts, engines and the environment as well
	rm -rf $(VENV) artifacts engines
