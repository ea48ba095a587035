"""Training data: records, sources, batches."""
