"""Compare detectors side by side: the same images, weights and measurements for all."""
