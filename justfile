# Short names for what contributors run: `just NAME`, by https://just.systems (`uvx --from rust-just just NAME` needs no
# installation). `just` alone lists them. Each step of `.ci/run` has a name here; a test holds that.

_default:
    @just --list --unsorted

# lint and format, and mend what can be mended
fix:
    uv run ruff check --fix
    uv run ruff format

# some tests, by pytest's own arguments: `just pytest tests/core/test_retry.py -k name`
pytest *arguments:
    uv run pytest {{arguments}}

# all steps of continuous integration
ci:
    .ci/run

# lint and format
lint:
    .ci/run lint

# types
types:
    .ci/run types

# types as users see them
public-types:
    .ci/run public-types

# the lock
lock:
    .ci/run lock

# the wheels
wheels:
    .ci/run wheels

# no registry addresses
addresses:
    .ci/run addresses

# the site of the documentation
docs:
    .ci/run docs

# tests, with every code block of README and docs
tests:
    .ci/run tests

# tests on the newest other Python
newest:
    .ci/run newest

# tests on the lowest versions declared
lowest:
    .ci/run lowest

# the files to deploy ctxdb-pgstatus by
deployment:
    .ci/run deployment

# programs with the libraries that people use
programs:
    .ci/run programs

# tests of ctxdb-core on its own
core:
    .ci/run core

# tests of ctxdb-starlette on its own
starlette:
    .ci/run starlette

# tests of ctxdb-litestar on its own
litestar:
    .ci/run litestar

# tests of ctxdb-aiohttp on its own
aiohttp:
    .ci/run aiohttp

# tests of ctxdb-pgstatus on its own
pgstatus:
    .ci/run pgstatus

# tests of ctxdb-inspector on its own
inspector:
    .ci/run inspector

# private names in the lowest SQLAlchemy declared
sqlalchemy-lowest:
    .ci/run sqlalchemy-lowest

# private names in the newest SQLAlchemy
sqlalchemy-newest:
    .ci/run sqlalchemy-newest

# private names in the newest pre-release of SQLAlchemy
sqlalchemy-pre:
    .ci/run sqlalchemy-pre
