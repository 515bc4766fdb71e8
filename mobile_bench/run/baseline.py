"""A Python with llama-cpp-python built for this machine, to compare with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# llama-cpp-python's default build uses AMX if the CPU announces it; on some virtual machines
# those instructions trap. These flags give a build that uses everything else.
FLAGS = (
    "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON "
    "-DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_BF16=ON"
)


def install_baseline(folder: Path | None = None) -> str:
    """A Python with llama-cpp-python built for this machine, once, in about 5 minutes.

    folder: for its virtual environment, in the user's cache if None. Raises
    subprocess.CalledProcessError, OSError.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = folder or cache / "stoker" / "baseline"
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"building llama-cpp-python in {folder} (about 5 minutes)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        environment = {**os.environ, "CMAKE_ARGS": FLAGS}
        pip = [str(python), "-m", "pip", "install", "--quiet", "llama-cpp-python", "numpy"]
        try:
            subprocess.run(pip, check=True, env=environment)
        except BaseException:
            python.unlink(missing_ok=True)  # so that an unfinished build is tried again
            raise
    return str(python)
