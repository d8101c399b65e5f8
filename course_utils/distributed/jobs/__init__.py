"""Modules for the workers of chapter 09: what they do is explained there."""
