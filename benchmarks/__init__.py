"""Measurements; each module is a command, its numbers are in README.md."""
