#!/usr/bin/env bash
# Cross-compiles the native tests for aarch64 and runs them under qemu-user: correctness of the
# NEON kernels, never speed. Debian names of what it needs: g++-aarch64-linux-gnu qemu-user.
set -euo pipefail
cd "$(dirname "$0")/../.."
for tool in aarch64-linux-gnu-g++ qemu-aarch64 cmake; do
  command -v "$tool" >/dev/null || { echo "run_neon: needs $tool (apt-get install g++-aarch64-linux-gnu qemu-user cmake)" >&2; exit 2; }
done
export STOKER_TEST_QUICK=1  # emulation is slow: fewer sizes
build=build/neon
cmake -S . -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DCMAKE_EXE_LINKER_FLAGS=-static -DCMAKE_CROSSCOMPILING_EMULATOR="qemu-aarch64;-cpu;max" \
  -DSTOKER_PYTHON=OFF -DSTOKER_NATIVE_TESTS=ON >/dev/null
cmake --build "$build" -j "${CMAKE_BUILD_PARALLEL_LEVEL:-2}"
ctest --test-dir "$build" --output-on-failure
