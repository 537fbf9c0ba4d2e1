"""The command line: click commands over `core`, drawn with rich. Help imports no torch."""
