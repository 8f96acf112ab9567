"""The page of a report: series of numbers, pictures of them, and one file of HTML.

Knows the outcome of a run, and no other rendering but the rows of the text.
"""
