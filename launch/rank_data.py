"""The data of a run on each rank: indexed by one process, mapped by the others, and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.data.index.manifest import Manifest
    from pipeline.data.inputs import Inputs
    from pipeline.runtime.process_group import World


def agreed_inputs(config: Config, world: World, inputs: Inputs | None) -> Inputs:
    """Returns the run's data, the same on all ranks.

    A rank whose index is another than the first rank's, such as an old one on its node's disk, indexes the shards again.

    Args:
        config: the settings.
        world: the process group.
        inputs: the data, if this rank has prepared them already.

    Raises:
        DataError: this rank's shards are others than the first rank's.
    """
    import torch.distributed as dist

    from pipeline.data.inputs import data_identity, prepare

    if inputs is None:
        inputs = prepare(config, world.size, reuse=True)
    expected = [(_identities(inputs), data_identity(inputs), _versions(inputs))]
    dist.broadcast_object_list(expected, group=world.control)
    identities, identity, _ = expected[0]
    if (_identities(inputs), data_identity(inputs), _versions(inputs)) != expected[0]:
        inputs = prepare(config, world.size)
    if (_identities(inputs), data_identity(inputs)) != (identities, identity):
        raise DataError(
            f"rank {world.rank} of {world.size} reads other shards than the first rank",
            where=inputs.train.directory,
            hint="Give all nodes the same shards: `fovea shards index SHARDS` on each prints what it finds",
        )
    return inputs


def _manifests(inputs: Inputs) -> list[Manifest | None]:
    return [inputs.train, inputs.bank, inputs.queries, *(inputs.dense or ())]


def _identities(inputs: Inputs) -> list[str | None]:
    return [None if manifest is None else manifest.fingerprint for manifest in _manifests(inputs)]


def _versions(inputs: Inputs) -> list[str | None]:
    """Versions of the objects in storage, which all nodes see; files on local disks may differ in their times."""
    return [
        manifest.shards.version if manifest is not None and manifest.shards.may_be_remote else None
        for manifest in _manifests(inputs)
    ]
