"""A device profile in round numbers, for tests of forecasts."""

from __future__ import annotations

from stoker.offload.plan import device_profile
from stoker.offload.plan.device_profile import DeviceProfile

# Memory has 10 GB/s, storage 1 GB/s at 1 MiB.
PROFILE: DeviceProfile = {
    "kind": "profile",
    "version": device_profile.VERSION,
    "id": "0123456789ab",
    "name": "test device, 4 cores, 2 GB",
    "time": "2026-01-01T00:00:00+00:00",
    "quick": False,
    "stoker": "0",
    "platform": {"system": "Linux"},
    "cpu": {"performance": 2, "physical": 4},
    "isa": {"active": "avx2", "usable": ["scalar", "avx2"]},
    "memory": {"total": 2 << 30, "available": 1 << 30, "limit": None},
    "memory_reads": [{"threads": 1, "bytes_s": 6e9}, {"threads": 2, "bytes_s": 10e9}],
    "peaks": [{"kind": "float32", "isa": "avx2", "threads": 2, "ops_s": 50e9}],
    "formats": [
        {"format": "Q4_0", "isa": "avx2", "row_weights_s": 20e9, "tile_ops_s": 100e9},
        {"format": "Q8_0", "isa": "avx2", "row_weights_s": 15e9, "tile_ops_s": 90e9},
        {"format": "F16", "isa": "avx2", "row_weights_s": 5e9, "tile_ops_s": 20e9},
    ],
    "storage": {"path": "/"},
    "storage_reads": [
        {"mode": "direct", "block": 1 << 16, "depth": 4, "bytes_s": 0.25e9},
        {"mode": "direct", "block": 1 << 20, "depth": 4, "bytes_s": 1e9},
        {"mode": "direct", "block": 1 << 20, "depth": 1, "bytes_s": 0.5e9},
        {"mode": "buffered", "block": 1 << 20, "depth": 4, "bytes_s": 9e9},
    ],
    "power": {},
}
