"""Registers exported weights in MLflow's model registry, linked to the run that trained them."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from pipeline.errors import LaunchError
from pipeline.tracking.mlflow_shipper import Shipper


def register(shipper: Shipper, folder: Path, model: str) -> int:
    """Uploads a folder to a new artifact path of the run and registers it as the newest version of a model.

    Args:
        shipper: shipper of the run.
        folder: output of ``fovea export``.
        model: name in the registry, created if missing.

    Returns:
        The version.

    Raises:
        LaunchError: MLflow is unreachable, or has no model registry.
    """
    from mlflow.exceptions import MlflowException

    try:
        client, run = shipper.connected()
        artifact_path = f"export/{folder.name}-{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:6]}"
        client.log_artifacts(run, str(folder), artifact_path=artifact_path)
        if not client.search_registered_models(filter_string=f"name = '{model}'"):
            client.create_registered_model(model)
        version: Any = client.create_model_version(
            model, source=f"{client.get_run(run).info.artifact_uri}/{artifact_path}", run_id=run, tags={"layout": folder.name}
        )
    except (MlflowException, OSError) as error:
        raise LaunchError(
            f"MLflow did not register the model ({str(error).splitlines()[0][:160]})",
            where=f"--register {model}",
            hint="Check that the server is running and has a registry, "
            "and try again with --overwrite; the export itself is complete",
        ) from error
    return int(version.version)
