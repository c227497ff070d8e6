"""The released programs' own behaviour, where it differs from the product's: for parity only."""
