"""The profile of this machine: the one that `stoker probe` saved, else a quick probe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ...offload.plan import device_profile
from ...offload.plan.device_profile import DeviceProfile, current_id

if TYPE_CHECKING:
    from ...runtime.base.progress import Progress


def this_device(progress: Progress | None = None) -> DeviceProfile:
    """The saved profile if it is of this hardware, else a quick probe of up to 10 seconds.

    Raises OptionError if the saved file is not a profile.
    """
    saved = device_profile.default_path()
    if saved.is_file():
        profile = device_profile.load(saved)
        if profile["id"] == current_id():
            return profile
    from .probe import probe

    print("no profile of this device: probing it quickly (see stoker probe)", file=sys.stderr)
    return probe(quick=True, progress=progress)
