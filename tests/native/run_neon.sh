#!/usr/bin/env bash
# Cross-compiles the native tests for aarch64 and runs them under qemu-user: correctness of the
# NEON kernels, never speed. Debian names of what it needs: g++-aarch64-linux-gnu qemu-user.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v qemu-aarch64 >/dev/null || { echo "run_neon: needs qemu-aarch64 (apt-get install qemu-user)" >&2; exit 2; }
export STOKER_TEST_QUICK=1  # emulation is slow: fewer sizes
bash mobile_bench/native/build_arm.sh all
ctest --test-dir "${STOKER_ARM_BUILD:-build/aarch64}" --output-on-failure
