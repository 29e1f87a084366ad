"""What each kernel must compute: plain PyTorch, and the CPU backend."""
