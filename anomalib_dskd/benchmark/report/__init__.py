"""The report of a benchmark: tables, plot and gallery from what the run left on disk."""
