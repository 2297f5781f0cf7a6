"""The preview shows the very views of training, all of them, and says which samples cannot be used."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.load import Loaded
from pipeline.data.inputs import Inputs, prepare
from pipeline.data.loader.bad_samples import BadSamples
from pipeline.data.loader.batch_stream import BatchStream, StreamOptions
from pipeline.data.loader.encoded_batches import StepDataset
from pipeline.data.loader.reader import Reader
from pipeline.errors import DataError
from pipeline.reports import images, preview
from pipeline.reports.page import render
from tests.data.inspect.test_verify import damaged_png
from tests.data.pack.test_packer import picture
from tests.data.pack.test_sources import write_tar
from tests.helpers.evaluation import toy

VIEWS = 4  # two global and two local crops
OUTSIDE = re.compile(r"https?:|(?:src|href)=\"(?!data:|#)|url\(|@import", re.IGNORECASE)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return toy(tmp_path_factory.mktemp("preview"), "evaluation.knn.enabled=false")


@pytest.fixture(scope="module")
def inputs(loaded: Loaded) -> Inputs:
    return prepare(loaded.config, 1)


@pytest.fixture(scope="module")
def samples(loaded: Loaded, inputs: Inputs) -> list[preview.Sample]:
    return preview.gather(loaded.config, inputs, preview.views_of(loaded.config), 4)


def card(sample: preview.Sample) -> str:
    counts = dict.fromkeys(("seed", "total", "shards", "classes", "replaced"), 1)
    html = render("preview", samples=[sample], title="", method="", legend="", rejected={}, **counts)
    return html.partition('class="card"')[2]


def test_every_view_of_the_method_is_drawn(samples: list[preview.Sample]) -> None:
    assert len(samples) == 4
    for sample in samples:
        assert [view.name for view in sample.views] == ["global 1", "global 2", "local 1", "local 2"]
        assert card(sample).count("<img ") == 1 + VIEWS


def test_views_and_masks_are_the_very_ones_of_the_first_step(
    loaded: Loaded, inputs: Inputs, samples: list[preview.Sample]
) -> None:
    config, specs = loaded.config, preview.views_of(loaded.config)
    dataset = StepDataset(Reader(inputs.train), inputs.order, specs, seed=config.run.seed, world=1, rank=0)
    options = StreamOptions(micro_batch=16, workers=0, hue="yiq")
    stream = BatchStream(dataset, device=torch.device("cpu"), options=options, bad_samples=BadSamples(None), last=1)
    ((_, (batch,)),) = list(stream)
    assert [sample.key for sample in samples] == batch.keys[:4]
    hidden = batch.masks["global"].grid.view(2, 16, 16)
    masked = 0
    for row, sample in enumerate(samples):
        for number, view in enumerate(sample.views):
            name, place, side = ("global", number, 32) if number < 2 else ("local", number - 2, 16)
            enlarged = view.image.width // side
            drawn = np.asarray(view.image)[enlarged // 2 :: enlarged, enlarged // 2 :: enlarged]
            seen = np.ones((side, side), dtype=bool)
            if name == "global":
                grid = hidden[place, row].view(4, 4).numpy()
                assert view.hidden == grid.mean()
                masked += int(grid.any())
                seen = ~grid.repeat(8, 0).repeat(8, 1)
            assert np.array_equal(drawn[seen], images.pixels(batch.views[name][place][row])[seen])
    assert masked, "none of the crops is masked, so nothing was tested"


def test_hidden_patches_are_veiled_and_no_others() -> None:
    image = Image.new("RGB", (64, 64), (255, 0, 0))
    hidden = np.zeros((4, 4), dtype=bool)
    hidden[1, 2] = True
    out = np.asarray(images.veiled(image, hidden)).astype(int)
    veiled = np.abs(out - np.array([255, 0, 0])).sum(-1) > 100
    assert veiled[16:32, 32:48].all() and veiled.sum() == 16 * 16


def test_frames_stand_where_the_boxes_are() -> None:
    image = Image.new("RGB", (200, 100), "black")
    out = images.boxed(image, [((0.25, 0.2, 0.75, 0.9), "#0072B2", "7", 4)])
    blue = np.argwhere((np.asarray(out) == (0x00, 0x72, 0xB2)).all(-1))
    assert np.abs(blue.min(0) - [20, 50]).max() <= 2 and np.abs(blue.max(0) - [89, 149]).max() <= 2
    assert np.asarray(out)[60, 100].sum() == 0, "the inside stays as it was"


def test_the_page_holds_everything_and_names_each_sample(loaded: Loaded, tmp_path: Path) -> None:
    out = tmp_path / "new" / "sheet.html"
    preview.write(loaded, out)
    page = out.read_text(encoding="utf-8")
    assert not OUTSIDE.search(page)
    assert page.count("<img ") == preview.SAMPLES * (1 + VIEWS)
    assert len(set(re.findall(r"<h3>(train_\d+)</h3>", page))) == preview.SAMPLES
    assert "on a" in page and "class " in page and "40 samples in 1 shard, 10 classes" in page
    assert "2 global views of 32 pixels" in page and "2 local views of 16 pixels" in page


def test_as_many_samples_are_drawn_as_asked_for(loaded: Loaded, tmp_path: Path) -> None:
    preview.write(loaded, tmp_path / "sheet.html", 3)
    assert (tmp_path / "sheet.html").read_text(encoding="utf-8").count("<img ") == 3 * (1 + VIEWS)


def test_a_png_is_one_picture_with_all_samples(loaded: Loaded, samples: list[preview.Sample], tmp_path: Path) -> None:
    preview.write(loaded, tmp_path / "sheet.PNG")
    sheet = Image.open(tmp_path / "sheet.PNG")
    assert sheet.format == "PNG" and sheet.height > preview.SAMPLES * samples[0].image.height
    drawn = np.asarray(preview.sheet(samples[:2]))
    for sample in samples[:2]:
        for view in (sample, *sample.views):
            assert _contains(drawn, np.asarray(view.image)), f"a picture of {sample.key} is not on the sheet"


def _contains(whole: np.ndarray, part: np.ndarray) -> bool:
    height, width = part.shape[:2]
    corners = np.argwhere((whole[: -height + 1, : -width + 1] == part[0, 0]).all(-1))
    return any(np.array_equal(whole[y : y + height, x : x + width], part) for y, x in corners)


def test_a_sample_that_cannot_be_used_is_told_with_its_reason(tmp_path: Path) -> None:
    config = toy(tmp_path, "evaluation.knn.enabled=false").config
    inputs, specs = prepare(config, 1), preview.views_of(config)
    bad = inputs.order.rank_batch(0, 1, 0).ids[1]
    key = inputs.train.rows(0).keys[int(bad) & 0xFFFFFFFF]
    shard = Path(inputs.train.shards[0].url)
    data = bytearray(shard.read_bytes())
    data[int(inputs.train.column(0, "image_offset")[int(bad) & 0xFFFFFFFF]) + 200] ^= 0xFF
    shard.write_bytes(data)
    samples = preview.gather(config, inputs, specs, 4)
    assert [len(sample.views) for sample in samples] == [VIEWS, 0, VIEWS, VIEWS]
    assert samples[1].key == key and "cannot be used (corrupt)" in samples[1].about
    assert "cannot be used (corrupt)" in card(samples[1])
    assert preview.sheet(samples).height > 0


def test_an_unwritable_place_is_one_sentence(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match=r"file/sheet\.html: cannot be written"):
        preview.write(loaded, tmp_path / "file" / "sheet.html")


def test_odd_keys_and_captions_are_drawn_and_replaced_captions_counted(tmp_path: Path) -> None:
    members = []
    for n in range(16):
        image = ("png", damaged_png()) if n % 2 else ("jpg", picture(n))
        members += [(f"caf\udce9-{n}\x1b[2J.{image[0]}", image[1]), (f"caf\udce9-{n}\x1b[2J.txt", b"caf\xe9\x1b[2J")]
    write_tar(tmp_path / "odd.tar", members)
    words = ["evaluation.knn.enabled=false", f"data.shards={tmp_path / 'odd.tar'}", f"data.index={tmp_path / 'odd_index'}"]
    loaded = toy(tmp_path, *words)
    for name in ("page.html", "sheet.png"):
        preview.write(loaded, tmp_path / name, 16)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "\x1b" not in page and "caf\\xe9-" in page and "caf\ufffd\\x1b[2J" in page
    assert "16 captions are not UTF-8" in page and "cannot be used (undecodable)" in page
