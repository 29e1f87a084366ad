"""Propose and verify: what speculation adds to a decode step."""
