"""The OpenAI-compatible server: a thin layer over `gristmill.engine.engine.Engine`."""
