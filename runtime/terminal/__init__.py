"""Code that the commands share: options, input, output, progress bars."""
