"""Runs compared and drawn afterwards, from their folders alone."""
