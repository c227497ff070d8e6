"""The released PyTorch layouts, in and out."""
