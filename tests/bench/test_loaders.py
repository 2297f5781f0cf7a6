"""The benchmark of loaders: what it says about the samples of each, measured in this process, and its page."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pipeline.bench import loader_probe, loaders
from pipeline.bench.loader_peers import PEERS, Setup, convert
from pipeline.bench.loaders import Measured, Options, Result, markdown, measure
from pipeline.errors import ConfigError
from tests.helpers.library import sample, write

HERE = [name for name in PEERS if name in ("fovea", "webdataset", "torchvision folders")]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("loaders")
    shards = []
    for shard in range(4):
        numbers = range(shard * 8, shard * 8 + 8)
        write(folder / f"{shard}.tar", {f"{n:06d}": {"jpg": sample(n)["jpg"], "cls": sample(n)["cls"]} for n in numbers})
        shards.append(str(folder / f"{shard}.tar"))
    convert(shards, folder)
    return {"shards": shards, "folder": str(folder), "batch": 4}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are replaced by calls, with the variables that they would have."""

    def process(request: dict[str, Any], environment: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
        return request, environment

    def answer(process: Any, _: dict[str, Any], __: Measured) -> dict[str, Any]:
        request, environment = process
        with pytest.MonkeyPatch.context() as patch:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            return loader_probe.MODES[request["mode"]](request)

    monkeypatch.setattr(loaders, "_process", process)
    monkeypatch.setattr(loaders, "_answer", answer)


@pytest.mark.parametrize("peer", HERE)
def test_samples_of_each_loader_are_accounted_for(peer: str, setup: dict[str, Any]) -> None:
    measured = Measured()
    loaders._properties(peer, setup, measured, Options(32, 4, 1))
    loaders._round(peer, setup, measured, 16)
    assert not measured.errors
    assert (measured.once, measured.resumed) == ("yes", "yes")
    assert all(len(values) == 1 and values[0] > 0 for values in (measured.raw, measured.decoded, measured.start, measured.resume))
    assert measured.worker is not None and measured.worker > 1
    if peer == "fovea":
        assert (measured.ranks, measured.elastic) == ("yes", "yes")
    if peer == "webdataset":
        assert measured.ranks.startswith("no")
        assert measured.elastic.startswith("no")


def test_decoded_images_are_the_same_whoever_reads_them(setup: dict[str, Any]) -> None:
    images = {}
    for peer in (name for name in HERE if PEERS[name].installed()):
        one = PEERS[peer](Setup(**{**setup, "shards": tuple(setup["shards"])}), decoded=True)
        images[peer] = {key: image.tobytes() for key, image in one}
    assert len(images["fovea"]) == 32
    assert all(one == images["fovea"] for one in images.values())


def test_what_is_wrong_is_counted() -> None:
    assert loaders._account(Counter("aab"), 4) == "no: 2 missing, 1 twice"
    assert loaders._account(Counter("abc"), 3, "other order") == "no: other order"


def test_the_page_says_where_others_are_better() -> None:
    ours = Measured(raw=[100.0, 90.0], decoded=[50.0], start=[1.0], resume=[1.0], rank=20.0, worker=5.0, once="yes")
    other = Measured(raw=[150.0], decoded=[40.0], start=[2.0], resume=[], rank=10.0, errors={"worker": "broke"})
    left_out = {"MosaicML Streaming": Measured("not installed")}
    result = Result("8 images", {"torch": "2"}, {"fovea": ours, "webdataset": other, **left_out})
    page = markdown(result, Options(), {"cores": "2"}, "fovea bench loaders")
    assert "| fovea | 100 | 50 | 1.00 | 1.00 | 20 | 5 |" in page
    assert "| webdataset | 150 | 40 | 2.00 | failed | 10 | failed |" in page
    assert "MosaicML Streaming is left out: not installed" in page
    assert "webdataset, worker: `broke`" in page
    assert "samples as bytes per CPU second: webdataset; the best is 1.50 x better than ours" in page
    assert "memory of a rank: webdataset" in page
    assert "decoded samples per CPU second:" not in page


def test_a_number_of_images_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a multiple of twice the batch"):
        measure(Options(images=30, batch=4))
