"""Decides which sequences run next, and takes in what a step computed. No torch."""
