"""Programs that measure a claim of the README; each prints its command line and figures."""
