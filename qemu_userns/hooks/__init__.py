"""Entry points that other programs start."""
