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
lists = $(if $(filter command,$(origin CATEGORIES) $(origin SEEDS)),\
	$(error make $@ takes CATEGORY= and SEED=, make benchmark the lists CATEGORIES= and SEEDS=))
config = $(if $(RECIPE),--config "experiments/$(RECIPE)/config.json")

words_of_benchmark = scripts/benchmark.py $(call flag,RECIPE,--recipe) $(which) \
	$(call flags,CATEGORIES,--categories) $(call flags,SEEDS,--seeds) $(place)

.DEFAULT_GOAL := help
.PHONY: help download train benchmark ablate evaluate predict export report board speed test torture

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

download: $(READY) ## MVTec AD, 4.9 GB, not for commercial use: DATA_ROOT= URL=mirror or file
	@$(PYTHON) scripts/download.py $(call flag,DATA_ROOT,--data-root) $(call flag,URL,--url) $(ARGS)

train: $(READY) ## train one category: CATEGORY= DATASET= DATA_ROOT= EXPERIMENT= SEED= RECIPE= ARGS=
	$(lists)@$(PYTHON) scripts/train.py $(config) $(which) $(place)

# With WORKERS torchrun starts that many processes, which share the runs; where one dies all start
# again and go on. What none of them could do is then told once, by the exit code too.
benchmark: $(READY) ## one recipe over all categories: RECIPE= CATEGORIES="a b" SEEDS="42 43" EXPERIMENT= WORKERS=
	@$(if $(WORKERS),{ WORLD_SIZE="$(WORKERS)" $(PYTHON) $(words_of_benchmark) --dry-run >/dev/null || \
		[ $$? = 1 ]; } && OMP_NUM_THREADS=1 $(PYTHON) -m \
		torch.distributed.run --standalone --nproc-per-node "$(WORKERS)" --max-restarts 3 \
		$(words_of_benchmark) &&) $(PYTHON) $(words_of_benchmark)

ablate: $(READY) ## what each part is worth: RECIPE= CATEGORIES= SEEDS= DATASET= EXPERIMENT=
	@$(PYTHON) scripts/ablate.py $(call flag,RECIPE,--recipe) $(which) \
		$(call flags,CATEGORIES,--categories) $(call flags,SEEDS,--seeds) $(place)

evaluate: $(READY) ## score a finished run again: CATEGORY= DATASET= DATA_ROOT= EXPERIMENT= SEED=
	@$(PYTHON) scripts/evaluate.py $(which) $(place)

predict: $(READY) ## score images: MODEL=.../model.pt IMAGES="file folder" OUTPUT=file.csv HEATMAPS=folder
	@set -f; $(PYTHON) scripts/predict.py $(call flag,MODEL,--model) $(call flags,IMAGES,--images) \
		$(call flag,OUTPUT,--output) $(call flag,HEATMAPS,--heatmaps) \
		$(call flag,DEVICE,--device) $(ARGS)

export: $(READY) ## one file that scores images with torch alone: MODEL=.../model.pt OUTPUT=file.pt2
	@$(PYTHON) scripts/export.py $(call flag,MODEL,--model) $(call flag,OUTPUT,--output) $(ARGS)

report: $(READY) ## an experiment as one HTML page: EXPERIMENT= DATA_ROOT= for the images it errs on
	@$(PYTHON) scripts/report.py $(call flag,EXPERIMENT,--experiment) $(place)

board: $(READY) ## look at losses and reconstructions in TensorBoard: EXPERIMENT=
	@$(PYTHON) -m tensorboard.main --logdir "experiments/$(or $(EXPERIMENT),local)"

speed: $(READY) ## what this machine does in a second, beside its roof: EXPERIMENT= ARGS=
	@$(PYTHON) scripts/speed.py $(call flag,EXPERIMENT,--experiment) $(place)

test: $(READY) ## ruff, where this Python has it, and pytest
	@if $(PYTHON) -c "import ruff" 2>/dev/null; \
		then $(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .; \
		else echo "no ruff with $(PYTHON): the code is not linted"; fi
	@$(PYTHON) -m pytest

torture: $(READY) ## kill -9 at random, full disks, 50,000 steps: half an hour
	@$(PYTHON) -m pytest -s tests/torture.py
