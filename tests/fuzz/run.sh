#!/usr/bin/env bash
# Fuzzes the GGUF reader under libFuzzer, ASan and UBSan. Needs clang with its runtime (Debian:
# clang-14 libclang-rt-14-dev).
# usage: tests/fuzz/run.sh path/to/venv/bin SECONDS
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=$1 seconds=$2
clang=$(command -v clang++ || command -v clang++-14) || {
  echo "fuzz: needs clang++ (apt-get install clang-14 libclang-rt-14-dev)" >&2
  exit 2
}
build=build/fuzz
cmake -S . -B "$build" -DCMAKE_CXX_COMPILER="$clang" -DCMAKE_C_COMPILER="${clang/++/}" \
  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DSTOKER_PYTHON=OFF -DSTOKER_FUZZ=ON \
  -DSTOKER_SANITIZE=fuzzer-no-link,address,undefined >/dev/null
cmake --build "$build" -j "${CMAKE_BUILD_PARALLEL_LEVEL:-2}" --target gguf_fuzz
"$bin/python" tests/fuzz/make_seeds.py "$build/seeds"
mkdir -p "$build/corpus"
# malloc_limit: a count in a file must never make the reader allocate much more than the file has.
"$build/gguf_fuzz" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -malloc_limit_mb=64 \
  -print_final_stats=1 "$build/corpus" "$build/seeds"
