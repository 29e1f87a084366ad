"""The two models, their layers and the loader of their checkpoints."""
