"""Tests that start real QEMUs and real guests."""
