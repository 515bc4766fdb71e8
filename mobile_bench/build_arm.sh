#!/usr/bin/env bash
# Cross-builds stoker-bench for aarch64 Linux and Android: one static program that needs nothing of
# the device but its kernel. Debian names of what it needs: g++-aarch64-linux-gnu cmake.
#
#   mobile_bench/build_arm.sh             build/aarch64/stoker-bench
#   mobile_bench/build_arm.sh all         the native tests too (tests/native/run_neon.sh runs them)
#   CROSS=aarch64-none-linux-gnu- mobile_bench/build_arm.sh    with another compiler
set -euo pipefail
cd "$(dirname "$0")/.."
cross=${CROSS:-aarch64-linux-gnu-}
for tool in "${cross}g++" cmake; do
  command -v "$tool" >/dev/null || { echo "build_arm: needs $tool (apt-get install g++-aarch64-linux-gnu cmake)" >&2; exit 2; }
done
build=${STOKER_ARM_BUILD:-build/aarch64}
# A static program has no dynamic linker to start threads lazily: all of libpthread, so that no weak
# symbol of it stays empty (glibc 2.34 and later have it in libc).
cmake -S . -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_C_COMPILER="${cross}gcc" -DCMAKE_CXX_COMPILER="${cross}g++" \
  -DCMAKE_EXE_LINKER_FLAGS="-static -Wl,--whole-archive -lpthread -Wl,--no-whole-archive" \
  -DCMAKE_CROSSCOMPILING_EMULATOR="qemu-aarch64;-cpu;max" \
  -DSTOKER_PYTHON=OFF -DSTOKER_NATIVE_TESTS=ON -DSTOKER_BENCH=ON >/dev/null
cmake --build "$build" --target "${@:-stoker-bench}" -j "${CMAKE_BUILD_PARALLEL_LEVEL:-2}"
echo "$build/stoker-bench"
