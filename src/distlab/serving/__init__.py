"""What scripts that serve a model share: a small model to serve, and clients that load a server."""
