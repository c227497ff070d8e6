"""Speech -> codes: the causal Whisper-VQ encoder and its quantiser."""
