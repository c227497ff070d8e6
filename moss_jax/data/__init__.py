"""Data, from recordings and text to packed batches: manifests, sequence formats, shards, packing, the Grain pipeline.

    batches = open_batches(Mixture((("podcasts", "DATA/podcasts", 3.0), ("text", "DATA/text", 1.0)), seed=0), config,
                           context=14336, batch_size=8)
    batch = next(batches)      # {"grid": int32 [B, T, 2], "positions", "segment_ids", "loss_weights", "source"}

docs/data.md is the guide.
"""

import importlib
from typing import Any

PUBLIC = {
    "PackedBatches": "pipeline",
    "Example": "formats",
    "Mixture": "pipeline",
    "open_batches": "pipeline",
    "write_examples": "store",
}


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(importlib.import_module(f"moss_jax.data.{PUBLIC[name]}"), name)
    raise AttributeError(f"module 'moss_jax.data' has no attribute {name!r}")
