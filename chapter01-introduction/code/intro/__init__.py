"""What the scripts of chapter 1 share, and what stands behind them."""
