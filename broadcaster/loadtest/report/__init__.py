"""The report of a load test: figures, verdict and pictures, made from the files of a run.

Reads what `loadtest` has recorded, and measures nothing itself.
"""
