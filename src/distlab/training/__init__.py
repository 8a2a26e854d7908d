"""What every training script needs and none teaches; the loop is the script's own.

Flags and what they refuse (`flags`), losses on held-out text (`held_out`), how far the run is, its
learning rate and the request to stop (`progress`), and what became of it (`outcome`).
"""
