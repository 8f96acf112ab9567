"""Types and helpers that all other folders share; imports no other folder of the package."""
