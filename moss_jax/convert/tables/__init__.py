"""The name tables of the released checkpoints, one module for each model."""
