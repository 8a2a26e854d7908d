"""Chapter 4's package: what its scripts share, and the proofs behind them."""
