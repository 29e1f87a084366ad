"""Kernels, each with a PyTorch reference of the same name and signature in reference/."""
