"""Training-only components that are independent of any model: feature cache, weight average, batch-norm statistics."""
