# `make check` is what CI runs. The others use the environment that is active.
.PHONY: check lint test coverage docs

check:
	.ci/run

lint:
	ruff check .
	ruff format --check .
	pyright
	lint-imports

test:
	python -m pytest -q -n 2

coverage:
	python -m pytest -q -n 2 --cov --cov-report=term-missing:skip-covered

docs:
	mkdocs build --strict
