"""Tests that need no guest; each finishes in moments."""
