"""What must be decided before any test imports the engine."""

import os

import torch

# Without a GPU, kernels are tested in Triton's interpreter, and Triton looks when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
