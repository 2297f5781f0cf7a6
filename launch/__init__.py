"""The command line and everything that starts processes. Imports ``pipeline``; nothing in ``pipeline`` imports this."""
