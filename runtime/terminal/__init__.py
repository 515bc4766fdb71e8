"""What the commands share: their options, what they read and write, progress bars."""
