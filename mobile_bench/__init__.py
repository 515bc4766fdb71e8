"""stoker.mobile_bench."""
