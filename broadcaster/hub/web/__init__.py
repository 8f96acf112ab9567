"""The JavaScript client and the live page, and what serves their files."""
