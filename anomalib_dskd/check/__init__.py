"""The command ``anomalib-dskd check``: it reads every file of a data set and reports problems."""
