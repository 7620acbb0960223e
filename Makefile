# Thin targets over scripts/. Defaults live in Python; ARGS="--flag value" passes any flag on.

ifeq ($(origin PYTHON), undefined)
PYTHON := .venv/bin/python
READY := .venv/installed
endif

# $(call flag,NAME,--name): the flag where the variable is set; flags: a list of words
flag = $(if $($(1)),$(2) "$($(1))")
flags = $(if $($(1)),$(2) $($(1)))
place = $(call flag,DATA_ROOT,--data-root) $(call flag,DEVICE,--device) $(ARGS)
which = $(call flag,DATASET,--dataset) $(call flag,CATEGORY,--category) $(call flag,SEED,--seed) \
	$(call flag,EXPERIMENT,--experiment)
recipe = $(call flag,RECIPE,--recipe) $(which)
lists = $(call flags,CATEGORIES,--categories) $(call flags,SEEDS,--seeds)

# What each target takes beside PYTHON; any other variable is an error, a misspelled one too
run := DATASET CATEGORY SEED EXPERIMENT DATA_ROOT DEVICE ARGS
takes_download := DATA_ROOT URL ARGS
takes_train := RECIPE $(run)
takes_benchmark := RECIPE $(run) CATEGORIES SEEDS WORKERS
takes_ablate := RECIPE $(run) CATEGORIES SEEDS
takes_evaluate := $(run)
takes_predict := MODEL IMAGES OUTPUT HEATMAPS REPORT DEVICE ARGS
takes_calibrate := MODEL IMAGES OUTPUT DEVICE ARGS
takes_export := MODEL OUTPUT ARGS
takes_report := EXPERIMENT DATA_ROOT DEVICE ARGS
takes_board := EXPERIMENT
takes_speed := EXPERIMENT DATA_ROOT DEVICE ARGS
given := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
$(foreach goal,$(MAKECMDGOALS),$(foreach name,$(filter-out PYTHON $(takes_$(goal)),$(given)),\
	$(error make $(goal) does not know $(name)=; it takes $(or $(takes_$(goal)),no variables))))

words_of_benchmark = scripts/benchmark.py $(recipe) $(lists) $(place)

.DEFAULT_GOAL := help
.PHONY: help download train benchmark ablate evaluate predict calibrate export report board speed test torture

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

download: $(READY) ## MVTec AD, 5.3 GB, not for commercial use: DATA_ROOT= URL=mirror or file
	@$(PYTHON) scripts/download.py $(call flag,DATA_ROOT,--data-root) $(call flag,URL,--url) $(ARGS)

train: $(READY) ## train one category: CATEGORY= DATASET= DATA_ROOT= EXPERIMENT= SEED= RECIPE= ARGS=
	@$(PYTHON) scripts/train.py $(recipe) $(place)

# With WORKERS torchrun starts that many processes, which share the runs. If one dies, torchrun starts
# all of them again. Then the script runs once more alone: it lists the failures and sets the exit code.
benchmark: $(READY) ## one recipe over all categories: RECIPE= CATEGORIES="a b" SEEDS="42 43" EXPERIMENT= WORKERS=
	@$(if $(WORKERS),{ WORLD_SIZE="$(WORKERS)" $(PYTHON) $(words_of_benchmark) --dry-run >/dev/null || \
		[ $$? = 1 ]; } && OMP_NUM_THREADS=1 $(PYTHON) -m \
		torch.distributed.run --standalone --nproc-per-node "$(WORKERS)" --max-restarts 3 \
		$(words_of_benchmark) &&) $(PYTHON) $(words_of_benchmark)

ablate: $(READY) ## what each part of a recipe is worth: RECIPE= CATEGORIES= SEEDS= EXPERIMENT=
	@$(PYTHON) scripts/ablate.py $(recipe) $(lists) $(place)

evaluate: $(READY) ## score a finished run again: CATEGORY= DATASET= DATA_ROOT= EXPERIMENT= SEED=
	@$(PYTHON) scripts/evaluate.py $(which) $(place)

predict: $(READY) ## score images: MODEL=.../model.pt IMAGES="file folder 'with space'" OUTPUT=file.csv HEATMAPS=folder REPORT=page.html
	@set -f; $(PYTHON) scripts/predict.py $(call flag,MODEL,--model) $(call flags,IMAGES,--images) \
		$(call flag,OUTPUT,--output) $(call flag,HEATMAPS,--heatmaps) $(call flag,REPORT,--report) \
		$(call flag,DEVICE,--device) $(ARGS)

calibrate: $(READY) ## learn the threshold again from other good images: MODEL= IMAGES= OUTPUT=file.pt
	@set -f; $(PYTHON) scripts/calibrate.py $(call flag,MODEL,--model) $(call flags,IMAGES,--images) \
		$(call flag,OUTPUT,--output) $(call flag,DEVICE,--device) $(ARGS)

export: $(READY) ## one file that scores images with torch or ONNX alone: MODEL=.../model.pt OUTPUT=file.pt2 or .onnx
	@$(PYTHON) scripts/export.py $(call flag,MODEL,--model) $(call flag,OUTPUT,--output) $(ARGS)

report: $(READY) ## an experiment as one HTML page: EXPERIMENT= DATA_ROOT= also shows the worst errors
	@$(PYTHON) scripts/report.py $(call flag,EXPERIMENT,--experiment) $(place)

board: $(READY) ## look at losses and reconstructions in TensorBoard: EXPERIMENT=
	@$(PYTHON) -m tensorboard.main --logdir "experiments/$(or $(EXPERIMENT),local)"

speed: $(READY) ## measure speed, compared with the machine's limit: EXPERIMENT= ARGS=
	@$(PYTHON) scripts/speed.py $(call flag,EXPERIMENT,--experiment) $(place)

test: $(READY) ## ruff and pytest on all cores; a missing ruff or xdist is skipped
	@if $(PYTHON) -c "import ruff" 2>/dev/null; \
		then $(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .; \
		else echo "no ruff with $(PYTHON): the code is not linted"; fi
	@$(PYTHON) -m pytest $$($(PYTHON) -c "import xdist; print('-n auto')" 2>/dev/null)

torture: $(READY) ## kill -9 at every write, full disks, 50,000 steps: half an hour
	@$(PYTHON) -m pytest -s tests/torture.py
