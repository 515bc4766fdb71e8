"""The commands of `stoker export`; each has a file, and main.py joins them."""
