"""The nouns and helpers that every other folder shares; it may import no other folder of the package."""
