"""Adversarial inputs, each with an oracle of its own that shares nothing with the library."""
