"""The command line and process launchers. Imports ``pipeline``; nothing in ``pipeline`` imports this package."""
