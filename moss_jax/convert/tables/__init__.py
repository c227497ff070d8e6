"""The name tables of the released checkpoints: data."""
