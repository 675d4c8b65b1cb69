"""Network blocks and helpers that are independent of any particular model."""
