#!/usr/bin/env bash
# Cross-builds for aarch64. Debian names of what it needs: g++-aarch64-linux-gnu cmake.
#
#   build_arm.sh          build/aarch64/stoker-bench, for Linux and Android: one static program that
#                         needs nothing of the device but its kernel
#   build_arm.sh all      the native tests too (tests/native/run_neon.sh runs them)
#   build_arm.sh wheel    build/aarch64/wheel/*.whl: the Python package for boards, for the version
#                         of $PYTHON [python3] and this compiler's glibc
#   CROSS=aarch64-none-linux-gnu- build_arm.sh    with another compiler
set -euo pipefail
cd "$(dirname "$0")/../.."
cross=${CROSS:-aarch64-linux-gnu-}
for tool in "${cross}g++" cmake; do
  command -v "$tool" >/dev/null || { echo "build_arm: needs $tool (apt-get install g++-aarch64-linux-gnu cmake)" >&2; exit 2; }
done
build=${STOKER_ARM_BUILD:-build/aarch64}

if [ "${1:-}" = wheel ]; then
  # What builds has an environment of its own: once the platform is named, pip would look for an
  # aarch64 ninja.
  "${PYTHON:-python3}" -m venv "$build/venv"
  bin=$(cd "$build/venv/bin" && pwd)
  "$bin/python" -m pip install --quiet cmake nanobind ninja 'scikit-build-core>=1.0.3'
  abi=$("$bin/python" -c 'import sys; print("cpython-%d%d" % sys.version_info[:2])')
  PATH="$bin:$PATH" _PYTHON_HOST_PLATFORM=linux-aarch64 \
    SETUPTOOLS_EXT_SUFFIX=".$abi-aarch64-linux-gnu.so" \
    "$bin/python" -m pip wheel . --no-deps --no-build-isolation -w "$build/wheel" \
    -C "build-dir=$build/wheel-build" \
    -C cmake.define.CMAKE_SYSTEM_NAME=Linux -C cmake.define.CMAKE_SYSTEM_PROCESSOR=aarch64 \
    -C "cmake.define.CMAKE_C_COMPILER=${cross}gcc" -C "cmake.define.CMAKE_CXX_COMPILER=${cross}g++" \
    -C "cmake.define.CMAKE_MODULE_LINKER_FLAGS=-static-libstdc++ -static-libgcc"
  ls "$build"/wheel/*.whl
  exit
fi

# A static program has no dynamic linker to start threads lazily: all of libpthread, so that no weak
# symbol of it stays empty (glibc 2.34 and later have it in libc).
cmake -S . -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_C_COMPILER="${cross}gcc" -DCMAKE_CXX_COMPILER="${cross}g++" \
  -DCMAKE_EXE_LINKER_FLAGS="-static -Wl,--whole-archive -lpthread -Wl,--no-whole-archive" \
  -DCMAKE_CROSSCOMPILING_EMULATOR="qemu-aarch64;-cpu;max" \
  -DSTOKER_PYTHON=OFF -DSTOKER_NATIVE_TESTS=ON -DSTOKER_BENCH=ON >/dev/null
cmake --build "$build" --target "${@:-stoker-bench}" -j "${CMAKE_BUILD_PARALLEL_LEVEL:-2}"
echo "$build/stoker-bench"
