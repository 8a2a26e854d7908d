"""What the scripts of chapter 6 share beside the engine, and what stands behind them."""
