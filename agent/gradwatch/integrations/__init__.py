"""Callbacks for libraries that own the training loop: run name, configuration and metrics."""
