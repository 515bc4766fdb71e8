"""The profile of the machine that measures: what `stoker probe` saved, else a quick probe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped, unused-ignore]

from . import device_profile
from .device_profile import DeviceProfile, device_id

if TYPE_CHECKING:
    from ..models.cache import Progress


def this_device(progress: Progress | None = None) -> DeviceProfile:
    """Raises OptionError where the saved profile is none. A profile of other hardware is not used.

    Takes up to 10 seconds where nothing was saved.
    """
    saved = device_profile.default_path()
    if saved.is_file():
        profile = device_profile.load(saved)
        if profile["id"] == this_id():
            return profile
    from .probe import probe

    print("no profile of this device: probing it quickly (see stoker probe)", file=sys.stderr)
    return probe(quick=True, progress=progress)


def this_id() -> str:
    """The DeviceProfile.id of this machine."""
    from ..runtime._core import cpu, isas

    told = cpu()
    usable = [name for name, executes in isas() if executes]
    memory = psutil.virtual_memory().total
    return device_id(told["model"], told["physical"], memory, usable[-1])
