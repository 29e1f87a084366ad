"""Measuring: accuracy with and without the draft, and speed."""
