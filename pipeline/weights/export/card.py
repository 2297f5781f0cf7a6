"""Model card of an export: weights, training data and settings, usage, scores."""

from __future__ import annotations

import json
from collections.abc import Sequence

import yaml

from pipeline.config.sizes import height_width
from pipeline.data.formats.channels import full_range
from pipeline.weights.export.networks import Networks, Preprocessing, meta


def card(networks: Networks, *, layout: str, usage: str, notes: Sequence[str], license_: str, name: str) -> str:
    """A README in Hugging Face's model card format: YAML metadata, then text and tables.

    Args:
        networks: the exported networks.
        layout: layout of the files.
        usage: lines of Python that load them.
        notes: what was left out or converted.
        license_: licence identifier as used by Hugging Face.
        name: name of the model.
    """
    manifest, config, p = networks.saved.manifest, networks.config, networks.preprocessing
    data = manifest.get("data", {})
    head = {
        "license": license_,
        "library_name": layout,
        "pipeline_tag": "zero-shot-image-classification" if layout == "open_clip" else "image-feature-extraction",
        "tags": ["fovea", config.method.name],
    }
    facts = {
        "method": config.method.name,
        "weights": f"the {networks.network}'s, fp32",
        "parameters": f"{sum(t.numel() for t in networks.timm_model.parameters()):,} in the vision tower",
        "samples seen": f"{manifest.get('samples_seen', 'unknown')}",
        "steps": f"{manifest.get('step')} ({manifest.get('applied', '?')} applied, {manifest.get('skipped', '?')} skipped)",
        "data": f"{data.get('samples', '?')} samples, fingerprint `{data.get('fingerprint', 'unknown')}`",
        "settings": f"fingerprint `{manifest.get('fingerprint', 'unknown')}`",
        "run": f"{manifest.get('run', config.run.name)}, checkpoint {networks.saved.path.name}",
        "written by": f"fovea {manifest.get('fovea', '?')}, torch {manifest.get('torch', '?')}",
    }
    reading = {
        "size": _size(p),
        "interpolation": f"{p.interpolation}, antialiased",
        "mean": ", ".join(map(str, p.mean)),
        "standard deviation": ", ".join(map(str, p.std)),
        **_channels(p),
        "patch": f"{networks.tower.patch} pixels",
    }
    known = manifest.get("scores", {})
    scores = {key: f"{known[key]:.4f}" for key in sorted(manifest.get("judged", known)) if key in known}
    scored = f" (of step {manifest['scored']})" if manifest.get("scored", -1) >= 0 else ""
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        _table(facts),
        f"## Loading\n\n```python\n{usage.strip()}\n```",
        f"## Images\n\n{_table(reading)}",
        f"## Scores{scored}\n\n{_table(scores) if scores else 'None were measured while training.'}",
    ]
    if notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in notes))
    parts.append(f"## Settings\n\n```json\n{json.dumps(meta(config), indent=1)}\n```")
    return "\n\n".join(parts) + "\n"


def _size(p: Preprocessing) -> str:
    height, width = height_width(p.size)
    if height == width:
        return f"{height} x {width} pixels, the center of the image ({p.centre:.0%} of its shorter side)"
    part = f"the largest centered part of this aspect ratio ({p.centre:.0%} of its sides)"
    return f"{height} x {width} pixels (height x width), {part}"


def _channels(p: Preprocessing) -> dict[str, str]:
    """The channels of images that are not 8-bit RGB, and what the normalization calls one."""
    if not p.channels:
        return {}
    unit = "values as they are" if p.dtype == "float32" else f"values divided by {full_range(p.dtype):.0f}"
    return {"channels": f"{p.count}: {', '.join(p.channels)}", "values": f"{p.dtype}; mean and standard deviation are of {unit}"}


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
