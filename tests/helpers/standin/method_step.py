"""Steps of one method at real size on stand-in devices: ``python -m tests.helpers.standin.method_step OUT CONFIG [KEY=VALUE …]``.

The real trainer runs with everything that :func:`pipeline.training.build.assemble` builds, and with the real stream of batches;
only decoder and augmenter give images without pixels. Writes the records of the last steps as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.helpers.standin.process import begin, end
from tests.helpers.standin.recorder import Record, Recorder

_SIDE = 16  # of the scenes whose labels and captions are read


class _Enough(Exception):
    """Ends the run."""


class _Logger:
    def step(self, *_: Any) -> None: ...

    def log(self, text: str) -> None: ...


def measure(recorder: Recorder, name: str, overrides: list[str], rank: int, world: int, steps: int, kept: int) -> dict[str, Any]:
    """Runs ``steps`` steps of a config as one rank; returns the records of the last ``kept``, and the size of the model."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from pipeline.config.load import load
    from pipeline.data.inputs import prepare
    from pipeline.data.pack import synthetic
    from pipeline.runtime import process_group
    from pipeline.runtime.run_directory import RunDirectory
    from pipeline.runtime.stop_requests import StopRequests
    from pipeline.runtime.watchdog import Watchdog
    from pipeline.training.build import assemble
    from pipeline.weights import init_from as initial

    with tempfile.TemporaryDirectory(prefix="fovea-standin-") as folder:
        run = RunDirectory(Path(folder) / "run")
        forced = {
            "data.shards": f"{folder}/data/*train-*.tar",
            "data.index": f"{folder}/index",
            "data.num_workers": "0",
            "run.directory": str(run.path),
            "train.log_every": "1000000",
            "checkpoint.every": "1000000 steps",
            "evaluation.knn.enabled": "false",
            "train.compile": "false",
            "tracking.enabled": "false",
        }
        config = load(name, [*(f"{key}={value}" for key, value in forced.items()), *overrides]).config
        synthetic.write(Path(folder) / "data", train=config.train.global_batch_size, val=0, size=_SIDE, seed=0)
        place = {"rank": rank, "size": world, "local_rank": rank, "local_size": world}
        here = process_group.join(**place, address="127.0.0.1", port=0, key="standin")
        _without_pixels()
        initial.begin = lambda *_, **__: None  # type: ignore[assignment]
        register_optimizer_step_post_hook(lambda *_: recorder.count("optimizer step"))
        with _without_initial_weights():
            trainer = assemble(
                config,
                prepare(config, world),
                here,
                run,
                attempt=1,
                resume=None,
                manifest_fields={},
                requests=StopRequests(),
                journal=None,
                logger=_Logger(),
                watchdog=Watchdog(run.logs(1), rank, world),
            )
        trainer.phases._flops = None  # counting takes longer than all steps
        records: list[Record] = []
        enter = trainer.phases.enter

        def entered(phase: str, step: int | None = None) -> None:
            recorder.enter(phase)
            enter(phase, step)

        trainer.phases.enter = entered  # type: ignore[method-assign]
        original = trainer._batches

        def batches() -> Iterator[Any]:
            recorder.mark()
            for number, item in enumerate(original()):
                yield item
                record = recorder.mark()
                records.extend([record] * (number >= steps - kept))
                recorder.enter("data")
                if number + 1 >= steps:
                    raise _Enough

        trainer._batches = batches  # type: ignore[method-assign]
        with contextlib.suppress(_Enough):
            trainer.run()
        assert trainer.progress.applied >= steps - 1, "a step was skipped"
        shapes = trainer.engine.shapes.values()
        return {
            "config": name,
            "overrides": overrides,
            "rank": rank,
            "world": world,
            "parameters": sum(torch.Size(shape).numel() for shape in shapes),
            "tensors": len(trainer.engine.shapes),
            "groups": len(trainer.method.parameter_groups()),
            "records": [record.to_json() for record in records],
        }


def _without_pixels() -> None:
    """Replaces decoder and augmenter by ones that give images of the right shapes; what they do on a GPU needs one."""
    import numpy as np
    import torch

    from pipeline.data.loader import batch_stream

    class Decoder:
        def __init__(self, **_: Any) -> None: ...

        def decode(self, encoded: list[bytes], *_: Any, **__: Any) -> list[Any]:
            return [np.zeros((_SIDE, _SIDE, 3), np.uint8)] * len(encoded)

    class Augmenter:
        def __init__(self, *sets: Any, device_id: int | None = None, **_: Any) -> None:
            self._sets, self._device = sets, torch.device("cuda", device_id or 0)

        def run(self, images: list[Any], plan: Any, specs: Any = None, *_: Any, **__: Any) -> dict[str, list[Any]]:
            # An earlier checkout knows square views only.
            shapes = {spec.name: (spec.count, getattr(spec, "shape", (spec.size,) * 2)) for spec in specs or self._sets[0]}
            return {
                key: [torch.empty(len(images), 3, *shape, device=self._device) for _ in range(count)]
                for key, (count, shape) in shapes.items()
            }

    batch_stream.decoder_of = lambda *_, **__: Decoder()  # type: ignore[assignment,return-value]
    batch_stream.Decoder = Decoder  # type: ignore[attr-defined]  # of earlier checkouts
    batch_stream.Augmenter = Augmenter  # type: ignore[assignment,misc]


def _without_initial_weights() -> Any:
    """A context in which random initial weights are not drawn: it takes longer than everything else, and nobody reads them."""
    import torch
    from torch.overrides import TorchFunctionMode

    kinds = ("normal_", "uniform_", "trunc_normal_", "kaiming_", "xavier_", "orthogonal_")
    drawn = {torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_}
    drawn |= {function for name, function in vars(torch.nn.init).items() if name.startswith(kinds)}

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            if function in drawn:
                tensor: torch.Tensor = arguments[0] if arguments else (options or {})["tensor"]
                tensor.detach().zero_()  # what memory held before could be drawn again and again by a loop that rejects it
                return tensor
            return function(*arguments, **(options or {}))

    return Mode()


def main() -> None:
    """Entry of the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--kept", type=int, default=1)
    o = parser.parse_args()
    warnings.simplefilter("ignore")
    recorder = begin()
    result = measure(recorder, o.config, o.overrides, o.rank, o.world, o.steps, o.kept)
    o.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    end()
