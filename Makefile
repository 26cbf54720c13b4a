PYTHON ?= $(shell command -v python3.11 || echo python3)
RUN := .venv/bin/python
export OMP_NUM_THREADS ?= 1
.PHONY: setup browser test test-slow test-floors test-oldest fuzz demo demo-world comfyui bench full-size full-size-road contracts workflows pictures

setup:  # private environment, real ComfyUI, this pack linked into it; instant the second time
	@$(PYTHON) .ci/setup.py

browser: setup  # Chromium for the front-end checks, where it may be installed
	@$(RUN) .ci/browser.py

test: browser  # style, types, every test but gpu and slow
	@$(RUN) -m ruff check --quiet . && $(RUN) -m ruff format --check --quiet .
	@cd .cache/pack && ../../$(RUN) -m mypy --config-file ../../pyproject.toml --no-error-summary -p DiffLoRA.difflora_core -p DiffLoRA.nodes
	@$(RUN) -m pytest -n 2 --dist loadfile --durations 30

test-slow: setup  # the tests that take minutes
	@$(RUN) -m pytest -m "slow and not gpu"

demo: setup  # the main job: a photo becomes a LoRA and pictures, in output/demo/
	@$(RUN) -m difflora_core.demo.run

demo-world: setup  # rebuild the shipped demo world from seeds
	@$(RUN) -m difflora_core.demo.build

comfyui: setup  # the same ComfyUI for a browser
	@$(RUN) -m difflora_core.demo.comfyui.server

bench: setup  # make bench name=identity args='--quick'
	@$(RUN) -m benchmarks $(name) $(args)

full-size: setup  # every SDXL workflow with random weights of full size; 16 GB, args='--remove'
	@$(RUN) -m benchmarks workflows $(args)

full-size-road: setup  # its second part: photos to dataset, corpus, model, picture, at full size
	@$(RUN) -m benchmarks road $(args)

contracts: setup  # record new nodes, inputs and file fields; refuses what would break old ones
	@PYTHONPATH=. $(RUN) tests/contracts/contract.py

workflows: browser  # every file in workflows/ in ComfyUI's front end; screenshots in output/workflows/
	@$(RUN) -m difflora_core.demo.workflows

pictures: setup  # docs/pictures/, from runs of the demo's workflows
	@$(RUN) -m difflora_core.demo.workflows.pictures

test-floors: setup  # tests with the oldest packages that requirements.txt allows
	@$(RUN) .ci/floors.py $(args)

test-oldest: setup  # tests in the oldest ComfyUI that the pack works with
	@$(RUN) .ci/oldest.py $(args)

fuzz: setup  # 100,000 hostile files for every reader; a table of what became of them
	@$(RUN) -m tests.fuzz $(args)
