#!/usr/bin/env bash
# The test suite, native and Python, with ASan and UBSan; then with TSan what has threads: the engine,
# the expert store and its reads.
# usage: tests/sanitize.sh path/to/venv/bin [asan | tsan]
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(realpath "$1")
site=$("$bin/python" -c 'import stoker, pathlib; print(pathlib.Path(stoker.__file__).parent)')
# A report ends the process that made it, and so the run; the interpreter leaks by design.
# BLAS on one thread: its own threads are not instrumented, which TSan takes for races.
export ASAN_OPTIONS=detect_leaks=0
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:exitcode=66
export OPENBLAS_NUM_THREADS=1

build() {  # build NAME SANITIZERS OPTIONS...: build/sanitize-NAME
  local folder=build/sanitize-$1 sanitizers=$2
  shift 2
  # -O1: the kernels' templates take minutes each to compile instrumented with -O2.
  "$bin/cmake" -S . -B "$folder" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" \
    -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1 -DPython_EXECUTABLE="$bin/python" \
    -DSTOKER_SANITIZE="$sanitizers" "$@" >/dev/null
  "$bin/cmake" --build "$folder"
}

# Without address randomisation (setarch -R), which the TSan of older compilers cannot live with.
native() {  # native NAME [OPTIONS...]: its C++ test programs
  local folder=build/sanitize-$1
  shift
  setarch -R "$bin/ctest" --test-dir "$folder" --output-on-failure "$@"
}

python() {  # python NAME RUNTIME TESTS...: pytest on the installed package with this core in it
  local folder=build/sanitize-$1 runtime=$2
  shift 2
  local package=$folder/site
  rm -rf "$package" && mkdir -p "$package"
  cp -r "$site" "$package/stoker"
  rm -f "$package"/stoker/runtime/_core*.so
  cp "$folder"/_core*.so "$package/stoker/runtime/"
  # libstdc++ beside it: the sanitizer must find __cxa_throw before the module is loaded.
  local library
  library="$(g++ -print-file-name="$runtime") $(g++ -print-file-name=libstdc++.so.6)"
  # --capture=sys leaves standard error to the report of a dying process, which pytest would lose.
  LD_PRELOAD=$library PYTHONPATH=$PWD/$package \
    setarch -R "$bin/python" -m pytest -p no:cacheprovider --capture=sys --timeout=1800 "$@"
}

case "${2:-all}" in
  all | asan)
    build asan address,undefined -DSTOKER_NATIVE_TESTS=ON
    native asan
    # Left out: what runs programs of its own (qemu, Ray, a browser) and none of this core.
    python asan libasan.so tests --ignore=tests/bench/test_arm_bench.py --ignore=tests/bench/test_sweep.py \
      --ignore=tests/bench/test_report_browser.py
    ;;&
  all | tsan)
    build tsan thread -DSTOKER_NATIVE_TESTS=ON
    native tsan -R 'io_|flash_experts|weight_stream'
    python tsan libtsan.so tests/core/test_families.py tests/api/test_threads.py tests/offload/test_offload.py \
      tests/offload/test_offload_faults.py tests/offload/test_stream.py
    ;;
esac
