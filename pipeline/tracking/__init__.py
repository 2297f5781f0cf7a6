"""Experiment tracking: a journal on disk, and shippers that copy it to MLflow, Weights & Biases and TensorBoard."""

from pipeline.tracking.destination import Destination, destination
from pipeline.tracking.eval_journal import EvalDestination, eval_destinations
from pipeline.tracking.journal import Journal
from pipeline.tracking.mlflow_servers import check_address, destination_of, own_database, remember, server_of, shown_server
from pipeline.tracking.mlflow_shipper import Shipper
from pipeline.tracking.shipper import JournalShipper
from pipeline.tracking.trackers import check_installed, described, shippers

__all__ = [
    "Destination",
    "EvalDestination",
    "Journal",
    "JournalShipper",
    "Shipper",
    "check_address",
    "check_installed",
    "described",
    "destination",
    "destination_of",
    "eval_destinations",
    "own_database",
    "remember",
    "server_of",
    "shippers",
    "shown_server",
]
