# study · test · figures · notebooks · lab · clean; each makes .venv by itself
PY := .venv/bin/python
STAMP := .venv/requirements.sha256
RUN := $(PY) -m papermill --no-progress-bar
PROFILE ?= laptop
ARGS ?=

.PHONY: study test figures notebooks lab clean venv

# the stamp holds the hash of requirements.txt: an unchanged file installs nothing
venv:
	@sha256sum requirements.txt | cmp -s - $(STAMP) || { \
	  python3 -m venv .venv && \
	  $(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt && \
	  sha256sum requirements.txt > $(STAMP); }

# the grid of a profile: trains what lacks an adapter, ends with a table and the figures
study: venv
	@mkdir -p data/runs
	@$(RUN) --log-output notebooks/00_run_study.ipynb data/runs/00_run_study.ipynb \
	  -p profile $(PROFILE) $(ARGS)

test: venv
	$(PY) -m pytest -q tests

# every committed figure from data/results/, without a student or raw data
figures: venv
	@mkdir -p data/runs
	@for study in $$(cd data/results && ls -d */ | tr -d /); do \
	  [ -z "$$(ls data/results/$$study/*/metrics.json 2>/dev/null)" ] || \
	  $(RUN) notebooks/04_analyse_disconnect.ipynb data/runs/04-$$study.ipynb \
	    -p study $$study || exit 1; done
	@for dataset in cotempqa babi; do \
	  [ ! -f data/results/reaudit/$$dataset.json ] || TRACEKD_DATA_DIR= \
	  $(RUN) notebooks/05_reaudit_published.ipynb data/runs/05-$$dataset.ipynb \
	    -p dataset $$dataset || exit 1; done
	@for file in data/results/*/*/interventions.json; do run=$$(dirname $$file); \
	  $(RUN) notebooks/06_intervene_on_traces.ipynb data/runs/06-$$(basename $$run).ipynb \
	    -p run_id $$(basename $$run) -p study $$(basename $$(dirname $$run)) || exit 1; done
	@for file in data/results/stress/*.json; do source=$$(basename $$file .json); \
	  TRACEKD_DATA_DIR= $(RUN) notebooks/08_stress_the_parser.ipynb data/runs/08-$$source.ipynb \
	    -p source $$(echo $$source | sed s,published-,published/,) || exit 1; done

# every notebook again from its own defaults, in reading order, in place
notebooks: venv
	@for n in 01 02 03 04 00 05 06 07 08; do f=$$(ls notebooks/$${n}_*.ipynb 2>/dev/null) || continue; \
	  echo $$f; $(RUN) $$f $$f || exit 1; done

lab: venv
	.venv/bin/jupyter lab notebooks

clean:
	rm -rf .venv data/interim data/runs
