"""Backbones, heads and their parameter groups. Depends on timm and torch; knows no method and no data."""
