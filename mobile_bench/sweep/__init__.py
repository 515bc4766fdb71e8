"""Many measurements and exports, resumable, on this machine or on a cluster."""
