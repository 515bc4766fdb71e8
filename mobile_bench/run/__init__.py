"""One measurement: a case, the process it runs in, and the record of what came out."""
