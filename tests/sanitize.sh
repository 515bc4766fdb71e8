#!/usr/bin/env bash
# The test suite against a core built with ASan and UBSan, then the engine tests with TSan.
# usage: tests/sanitize.sh path/to/venv/bin
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(realpath "$1")
site=$("$bin/python" -c 'import stoker, pathlib; print(pathlib.Path(stoker.__file__).parent)')
run() {  # run NAME SANITIZERS RUNTIME TESTS...
  local name=$1 sanitizers=$2 runtime=$3
  shift 3
  local build=build/sanitize-$name
  "$bin/cmake" -S . -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPython_EXECUTABLE="$bin/python" \
    -DSTOKER_SANITIZE="$sanitizers" -DSTOKER_NATIVE_TESTS=ON >/dev/null
  "$bin/cmake" --build "$build"
  # A copy of the installed package with the sanitized core in it.
  local package=$build/site
  rm -rf "$package" && mkdir -p "$package"
  cp -r "$site" "$package/stoker"
  rm -f "$package"/stoker/runtime/_core*.so
  cp "$build"/_core*.so "$package/stoker/runtime/"
  local library
  # libstdc++ beside it: the sanitizer must find __cxa_throw before the module is loaded.
  library="$(g++ -print-file-name="$runtime") $(g++ -print-file-name=libstdc++.so.6)"
  # Without address randomisation (setarch -R), which TSan of older compilers cannot live with.
  # The interpreter leaks by design; a report of anything else stops the run.
  # BLAS on one thread: its own threads are not instrumented, which TSan takes for races.
  OPENBLAS_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
  TSAN_OPTIONS=halt_on_error=1:exitcode=66 LD_PRELOAD=$library PYTHONPATH=$PWD/$package \
    setarch -R "$bin/python" -m pytest -p no:cacheprovider --timeout=1800 "$@"
}
case "${2:-all}" in
  all | asan) run asan address,undefined libasan.so tests ;;&
  all | tsan) run tsan thread libtsan.so tests/test_families.py tests/test_threads.py ;;
esac
