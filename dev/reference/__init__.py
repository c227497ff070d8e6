"""What the released PyTorch code does where the product differs on purpose; for parity checks and tests only."""
