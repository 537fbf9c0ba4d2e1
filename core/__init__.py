"""The engine. It knows no method by name and imports nothing of `plugins` or `cli`."""
