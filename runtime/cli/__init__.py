"""The command line; each command has a file, and main.py joins them."""
