"""Limits that cannot be set; /v1/models tells them. Apart, as helper processes need no other settings."""

__all__ = ["LIMITS"]

LIMITS = {
    "n": 16,
    "prompts": 64,
    "top_logprobs": 20,
    "stop": 16,
    "stop_chars": 256,
    "logit_bias": 1024,
    "messages": 4096,
    "tools": 128,
    "json_depth": 64,
    "schema_bytes": 1 << 16,
    "headers": 100,
    "header_bytes": 1 << 16,
}
