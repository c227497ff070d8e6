"""Training of the speech decoder: the flow (codes -> mel) and the vocoder (mel -> speech)."""
