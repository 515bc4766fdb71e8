"""The command line: a file a command; main.py joins them."""
