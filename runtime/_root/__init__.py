"""stoker: runs language models that are bigger than the device."""
