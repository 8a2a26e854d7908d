"""What the scripts of chapter 2 share, and what stands behind them."""
