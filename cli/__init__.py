"""The command line: click commands over `core`, drawn with rich. Nothing here imports torch before it runs."""
