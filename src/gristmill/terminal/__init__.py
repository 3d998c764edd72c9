"""What the command line shows and reads: errors in one line, JSON, tables, progress, the chat screen."""
