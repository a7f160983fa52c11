"""The engine: corpus, model and the only training loop."""
