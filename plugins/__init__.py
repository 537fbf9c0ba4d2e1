"""Shipped methods, one file each."""
