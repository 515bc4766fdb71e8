"""The commands of `stoker export`: a file a verb; main.py joins them."""
