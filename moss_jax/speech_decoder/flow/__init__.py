"""Codes -> mel by flow matching: offline (`sampler.decode`) and streaming (`stream`)."""
