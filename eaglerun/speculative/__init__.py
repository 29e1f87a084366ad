"""Propose, verify and count: what speculation adds to a decode step."""
