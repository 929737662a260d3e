# `make check` is what CI runs. The others use the environment that is active.
.PHONY: check lint test docs

check:
	.ci/run

lint:
	ruff check .
	ruff format --check .
	pyright
	lint-imports

test:
	python -m pytest -q -n 2

docs:
	mkdocs build --strict
