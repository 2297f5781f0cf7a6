"""Export formats, one module each with a function ``write``; found by listing this folder."""
