"""Building blocks that know no particular model."""
