"""stoker.export."""
