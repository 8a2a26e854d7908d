"""What the scripts of chapter 3 share, and what stands behind them."""
