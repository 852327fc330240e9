"""The operating system and the terminal: atomic files, how commands begin and end, progress, and commands to
suggest."""
