"""Shared directories at rest: what a guest sees of them, and their conversion between 9p security models."""
