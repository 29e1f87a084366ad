"""The files of a checkpoint: architectures, weights, and the memory they take. No torch here."""
