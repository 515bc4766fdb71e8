#!/usr/bin/env bash
# Formatting, linting and types of the Python package; warnings as errors in our C++.
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
  echo "lint: clang-format-14 is absent: C++ formatting not checked" >&2
fi
build=build/lint
"$bin/cmake" -S . -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/$bin/ninja" -DSTOKER_PYTHON=OFF \
  -DSTOKER_NATIVE_TESTS=OFF -DSTOKER_BENCH=ON -DSTOKER_WERROR=ON >/dev/null
"$bin/cmake" --build "$build"
