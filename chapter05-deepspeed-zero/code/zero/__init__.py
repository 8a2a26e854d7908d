"""What chapter 5's scripts share, and what stands behind them."""
