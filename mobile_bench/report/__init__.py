"""Records as tables, plots, a page and Markdown."""
