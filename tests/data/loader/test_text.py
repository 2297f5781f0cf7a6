"""Captions: chosen by number, turned into open_clip's tokens, whatever is written in them."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.augment.views import TextSpec
from pipeline.data.loader import text
from pipeline.data.loader.text import Tokenizer, choose, last_positions, tokenizer, trimmed
from pipeline.errors import ConfigError
from tests.helpers.limits import cpu_limit

ROOT = Path(__file__).resolve().parents[3]
START, END = 49406, 49407
LETTERS = ((97, 123), (0x4E00, 0x9FA0))
TEXTS = [
    "a photo of a cat",
    "",
    "  Ein Löwe,   zwei Löwen &amp; drei…  ",
    "猫が二匹 🐈🐈‍⬛ на столе",
    "x" * 200,
    "it's 3 o'clock; don't!",
    "word " * 500,
    "tabs\tand\nlines\r\n",
    "mojibake: schÃ¶n",
]


def test_the_tokens_are_those_of_open_clip() -> None:
    theirs = text._module().SimpleTokenizer()
    for context in (77, 16):
        assert np.array_equal(Tokenizer(TextSpec(context=context))(TEXTS), theirs(TEXTS, context).numpy())
    ours = tokenizer(TextSpec())(TEXTS)
    assert ours.dtype == np.int64
    assert ours.shape == (len(TEXTS), 77)
    assert ours[0, :8].tolist() == [START, 320, 1125, 539, 320, 2368, END, 0]
    assert ours[1, :3].tolist() == [START, END, 0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=300), max_size=4), st.sampled_from([3, 8, 77]))
def test_every_row_starts_ends_once_and_is_padded_whatever_the_text(texts: list[str], context: int) -> None:
    tokens = tokenizer(TextSpec(context=context))(texts)
    assert tokens.shape == (len(texts), context)
    for row in tokens:
        (end,) = np.flatnonzero(row == END)
        assert row[0] == START and (row == START).sum() == 1
        assert not row[end + 1 :].any()
        assert row.argmax() == end  # what CLIP's pooling looks for


def test_the_end_mark_stays_when_a_caption_is_cut() -> None:
    tokens = tokenizer(TextSpec())(["a cat and " * 100, "猫" * 1000, "🐈" * 1000, "a1" * 1000])
    assert (tokens[:, -1] == END).all()
    assert (tokens[:, :-1] != END).all()


def test_a_caption_cannot_forge_the_marks() -> None:
    forged = ["a <end_of_text> b", "<START_OF_TEXT> a b", "a &lt;end_of_text&gt; b", "a &amp;lt;end_of_text&amp;gt; b"]
    assert np.array_equal(tokenizer(TextSpec())(forged), tokenizer(TextSpec())(["a b"] * 4))


def test_halves_of_surrogate_pairs_are_text_too() -> None:
    tokens = tokenizer(TextSpec())(["a \ud800 b", "a ? b"])
    assert np.array_equal(tokens[0], tokens[1])


def test_monstrous_captions_take_no_time() -> None:
    made = tokenizer(TextSpec())
    made(["warm"])
    draw = np.random.default_rng(0)
    latin, han = (draw.integers(low, high, 10**5).astype(np.uint32).tobytes().decode("utf-32-le") for low, high in LETTERS)
    for monster in (
        latin,
        han,
        "a" * 10**7,
        "猫" * 10**6,
        " ".join("ab" * 200 for _ in range(10**4)),
        "&lt;" * 10**6,
        "\0" * 10**6,
    ):
        with cpu_limit(30):  # uncut, the merges of such a word take hours
            assert (made([monster])[0] == END).sum() == 1


def test_rare_words_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_CACHED", 50)
    made = Tokenizer(TextSpec())
    before = made(["a cat <end_of_text>"])
    for number in range(20):
        made([" ".join(f"{chr(97 + number)}{chr(97 + other)}zq" for other in range(20))])
        assert len(made._made.cache) < 50 + 25
    assert np.array_equal(made(["a cat <end_of_text>"]), before)


@pytest.mark.slow
def test_every_process_makes_the_same_tokens_offline_and_without_the_whole_package() -> None:
    code = (
        "import sys, json, socket\n"
        "def refuse(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from pipeline.data.loader.text import tokenizer\nfrom pipeline.data.augment.views import TextSpec\n"
        "assert 'ftfy' not in sys.modules\n"
        "made = tokenizer(TextSpec())(json.loads(sys.argv[1]))\n"
        "assert 'open_clip' not in sys.modules\n"
        "print(json.dumps(made.tolist()))"
    )
    expected = tokenizer(TextSpec())(TEXTS).tolist()
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(TEXTS)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "17", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == expected
    again = pickle.loads(pickle.dumps(tokenizer(TextSpec())))
    assert len(pickle.dumps(again)) < 500
    assert again(TEXTS).tolist() == expected


def test_what_cannot_be_tokenised_offline_is_refused() -> None:
    with pytest.raises(ConfigError, match="would be fetched"):
        Tokenizer(TextSpec("ViT-B-16-SigLIP"))
    with pytest.raises(ConfigError, match="no architecture 'ViT-Q'"):
        Tokenizer(TextSpec("ViT-Q"))
    with pytest.raises(ConfigError, match="no room"):
        Tokenizer(TextSpec(context=2))


def test_a_choice_is_of_seed_epoch_and_sample_and_takes_all_captions_alike() -> None:
    captions = ["one", "two", "three"]
    chosen = [choose(captions, number, epoch, 5) for number in range(100) for epoch in range(9)]
    assert chosen == [choose(captions, number, epoch, 5) for number in range(100) for epoch in range(9)]
    assert all(240 < count < 360 for count in Counter(chosen).values()) and len(set(chosen)) == 3
    assert len({choose(captions, 7, epoch, 5) for epoch in range(20)}) == 3
    assert [choose(captions, n, 0, 5) for n in range(50)] != [choose(captions, n, 0, 6) for n in range(50)]


def test_empty_captions_are_never_chosen() -> None:
    assert {choose(["", "a", "  ", "b", "\n"], number, 0, 0) for number in range(50)} == {"a", "b"}
    assert choose([], 0, 0, 0) == choose(["", " "], 0, 0, 0) == ""


def test_trimming_leaves_every_end_mark_and_lengths_of_few_kinds() -> None:
    for words, length in ((0, 8), (6, 8), (7, 16), (14, 16), (15, 24), (20, 24), (75, 77), (200, 77)):
        tokens = tokenizer(TextSpec())(["!", " ".join(["dog"] * words)])  # "!" is number 0, like padding
        cut = trimmed(tokens)
        assert cut.shape == (2, length)
        assert (cut == 49407).sum() == 2 and not tokens[:, length:].any()
    assert trimmed(np.zeros((0, 77), dtype=np.int64)).shape == (0, 8)


def test_the_end_of_each_text_is_known_on_the_host_as_on_the_device() -> None:
    from pipeline.models.captions import last_position

    tokens = Tokenizer(TextSpec(context=16))([*TEXTS, "!", "!!!!! wow !!"])
    tokens[0, 2] = 0  # a token like any other
    assert last_positions(tokens) == last_position(torch.from_numpy(tokens)).tolist()
    assert last_positions(tokens)[1] == 1
