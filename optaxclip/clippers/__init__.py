"""The named methods, one file per idea."""
