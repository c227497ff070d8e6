"""Behaviour of the released PyTorch code from which the product differs on purpose; for parity checks and tests."""
