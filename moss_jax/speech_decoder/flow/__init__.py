"""Codes -> mel by flow matching: a whole utterance (`sampler.decode`) or a stream (`stream.CachedFlow`)."""
