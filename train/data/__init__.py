"""Corpus → clean documents → tokens → shards → batches. Only `train.data.loader` imports torch."""
