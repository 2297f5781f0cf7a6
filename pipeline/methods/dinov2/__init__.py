"""See ``method.py`` and ``settings.py``."""
