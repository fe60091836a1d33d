"""The flows: the only package that knows in which order things happen."""
