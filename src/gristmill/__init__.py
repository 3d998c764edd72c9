"""gristmill."""
