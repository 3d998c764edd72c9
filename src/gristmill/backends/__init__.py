"""Executors: each runs a step program on one kind of machine."""
