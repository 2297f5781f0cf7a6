"""Experiment tracking: a journal on disk, and a shipper that copies it to MLflow."""

from pipeline.tracking.destination import Destination, destination
from pipeline.tracking.eval_journal import EvalDestination, eval_destinations
from pipeline.tracking.journal import Journal
from pipeline.tracking.mlflow_servers import check_address, destination_of, own_database, remember, server_of, shown_server
from pipeline.tracking.mlflow_shipper import Shipper

__all__ = [
    "Destination",
    "EvalDestination",
    "Journal",
    "Shipper",
    "check_address",
    "destination",
    "destination_of",
    "eval_destinations",
    "own_database",
    "remember",
    "server_of",
    "shown_server",
]
