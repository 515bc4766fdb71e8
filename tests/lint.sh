#!/usr/bin/env bash
# Formatting, linting and types. (Warnings of our C++ are errors in the build, Makefile.)
# usage: tests/lint.sh path/to/venv/bin
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/python" -m mypy -p stoker
if command -v clang-format-14 >/dev/null; then
  git ls-files '*.cc' '*.h' | xargs clang-format-14 --dry-run --Werror
else
  echo "lint: clang-format-14 is absent: the formatting of C++ is not checked" >&2
fi
