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

# ruff first: it takes a second
test: venv
	.venv/bin/ruff format --check tracekd_utils.py tests
	.venv/bin/ruff format --check --line-length 88 notebooks
	.venv/bin/ruff check .
	$(PY) -m pytest -q tests

# every figure from data/results/, without student or raw data, three notebooks at a time; a line
# for each kind of file: the notebook that draws it, its output and parameters (0: what is saved)
figures: venv
	@mkdir -p data/runs
	@find data/results -name '*.json' | sed -n -e 's,^data/results/,,' \
	  -e 's,^\(.*\)/.*/metrics\.json,05_analyse_disconnect 05-\1 -r study \1,p' \
	  -e 's,^reaudit/\([a-z]*\)\.json,09_reaudit_published 09-\1 -r dataset \1,p' \
	  -e 's,^\(.*\)/.*/interventions\.json,06_intervene_on_traces 06-\1 -r study \1,p' \
	  -e 's,^calibration/calibration\.json,07_calibrate_instrument 07 -p n_studies 0,p' \
	  -e 's,^stress/\(.*\)\.json,08_stress_the_parser 08-\1 -p n_outputs 0 -r source \1,p' \
	  -e 's,^\(.*\)/speed\.json,90_benchmark_speed 90-\1 -p repeats 0 -r study \1,p' | sort -ru | sed \
	  -e 's,source published-,source published/,' \
	  -e 's,\([^ ]*\) \([^ ]*\),notebooks/\1.ipynb data/runs/\2.ipynb,' | \
	  TRACEKD_DATA_DIR= HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MPLBACKEND=agg xargs -L 1 -P 3 $(RUN)

# every notebook again from its own defaults, in reading order, in place
notebooks: venv
	@for n in 01 10 11 12 30 38 35 31 32 36 02 03 40 04 34 05 00 37 41 06 33 07 39 08 09 90 23; do f=$$(ls notebooks/$${n}_*.ipynb 2>/dev/null) || continue; \
	  echo $$f; $(RUN) $$f $$f || exit 1; done

lab: venv
	.venv/bin/jupyter lab notebooks

clean:
	rm -rf .venv data/interim data/runs
