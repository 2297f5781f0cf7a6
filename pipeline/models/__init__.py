"""Towers, heads, and how their parameters are grouped. Knows timm and torch, no method and no data."""
