"""The operating system and the terminal: files replaced as a whole, how a command begins and ends, progress,
commands to type."""
