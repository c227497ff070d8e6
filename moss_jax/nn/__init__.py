"""What models share: layers with logical axis names, attention picked by backend, RoPE, causal convolution."""
