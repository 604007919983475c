# make demo   install, then train, sample and draw the embedded digits
# make test   install the development requirements, lint, test
# Settings of the demo's scripts can be overridden: make demo TRAIN='--max_iters=100' SAMPLE='--steps=10'

PYTHON ?= python3
BIN = .venv/bin
DEMO_PACKAGES = $(shell grep -E '^(torch|scikit-learn|matplotlib)==' requirements-dev.txt)

demo: .venv/demo
	$(BIN)/python data/digits/make.py
	$(BIN)/python prepare.py data/digits/embeddings.pkl --out=data/digits --overwrite=True
	$(BIN)/python train.py config/train_digits.py --overwrite=True $(TRAIN)
	$(BIN)/python -m report.plot out-digits
	$(BIN)/python sample.py --out_dir=out-digits --plot=True $(SAMPLE)

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests

.venv/demo: requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt $(DEMO_PACKAGES)
	touch $@

.venv/dev: requirements.txt requirements-images.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@ .venv/demo

.PHONY: demo test
