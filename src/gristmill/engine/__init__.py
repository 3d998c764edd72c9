"""Turning prompts into text: sampling, scheduling, streaming."""
