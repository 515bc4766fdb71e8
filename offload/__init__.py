"""stoker.offload."""
