"""What computes: the ranks of an engine. Today one, in its own process."""
