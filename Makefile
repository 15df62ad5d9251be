# make demo: the main job on the embedded default model.   make test: all tests, ruff and mypy among them.
# make unit: the quick tests.   make lint: ruff, mypy and the help pages.
# make campaign: attempts to break the command line, the long form (benchmarks/campaign/README.md).
# make docs: the documentation site, build/docs/index.html; a warning is an error.
# make fuzz: the readers of foreign bytes under atheris, a minute each.
# make sbom: build/sbom.json, a CycloneDX list of what .venv holds.   make audit: known vulnerabilities of those versions.
# Each makes .venv on first use, with the exact versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
TOOLS := build/tools/bin

.PHONY: demo test unit lint docs campaign fuzz sbom audit clean

demo: .venv/.demo-ready
	$(BIN)/nirvana-deploy prune-export smollm2 --sparsity 0.2 --preset fast --quantize w4 --quantize-head --out demo --force

test: .venv/.test-ready
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

unit: .venv/.test-ready
	$(BIN)/python -m pytest -m unit

lint: .venv/.test-ready
	$(BIN)/python -m pytest -m gate tests/test_gates.py tests/cli

docs: .venv/.test-ready
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs build/docs

campaign: .venv/.test-ready
	$(BIN)/python benchmarks/campaign --long

fuzz: build/fuzz/.ready
	cd build/fuzz && for reader in gguf weights index tensors json toml recipe plan; do \
		PYTHONPATH=. ../../$(BIN)/python ../../benchmarks/campaign/fuzz_readers.py $$reader -max_total_time=60 || exit; done

sbom: .venv/.demo-ready build/tools/.ready
	$(TOOLS)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-format JSON --output-file build/sbom.json .venv/bin/python

# strict: what could not be looked up is a failure
audit: build/tools/.ready
	$(TOOLS)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

clean:
	rm -rf .venv demo build *.egg-info

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/.demo-ready: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,genai,gguf,recover]'
	touch $@

.venv/.test-ready: .venv/.demo-ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[cpu,docs,eval,genai,gguf,openvino,recover,rtx,serve,test]'
	touch $@

build/fuzz/.ready: .venv/.test-ready Makefile
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/fuzz atheris==3.0.0
	touch $@

build/tools/.ready: Makefile
	$(PYTHON) -m venv build/tools
	$(TOOLS)/pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0 pip-audit==2.10.1
	touch $@
