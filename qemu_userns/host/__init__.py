"""Looks at and opens things on the host."""
