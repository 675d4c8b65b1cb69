"""Building blocks of training that no network holds: feature cache, averaged weights, batch-norm statistics."""
