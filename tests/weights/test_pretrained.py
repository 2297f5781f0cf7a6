"""Foreign folders of weights execute nothing: pickles, Python files and indirections in them are refused or never looked at."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import CheckpointError, ConfigError, FoveaError
from pipeline.models.tensor_files import only_weights, read_tensors
from pipeline.weights.export.networks import read
from pipeline.weights.export.write import write
from pipeline.weights.init_from import find, weights_of
from pipeline.weights.pretrained import load
from tests.helpers.exported import CLIP, DINO, checkpoint, settings

CPU = torch.device("cpu")


class Evil:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


CODE = "import os\nos.system('touch {mark}')\nfrom transformers import PreTrainedTokenizer\nclass T(PreTrainedTokenizer): pass\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good folders, one of each layout."""
    base = tmp_path_factory.mktemp("good")
    dino, clip = checkpoint(base / "dino", settings(DINO))[0], checkpoint(base / "clip", settings(CLIP))[0]
    made = {"timm": dino, "huggingface": dino, "open_clip": clip}
    return {layout: write(read(saved), layout, base / layout) for layout, saved in made.items()}


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    return target


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def attempt(folder: Path) -> FoveaError | None:
    """Loads a folder as ``fovea eval`` does, with texts if it knows any; what it was refused with."""
    try:
        peer = load(str(folder), model=None, device=CPU)
        if peer.subject.texts is not None:
            peer.subject.texts(["a dog"])
    except FoveaError as error:
        assert "weights_only" not in str(error) and "\n" not in str(error)
        return error
    return None


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        ("timm", "pytorch_model.bin"),
        ("timm", "model.pth"),
        ("huggingface", "pytorch_model.bin"),
        ("open_clip", "open_clip_pytorch_model.bin"),
    ],
)
def test_a_pickle_among_the_weights_is_refused_in_one_sentence(
    exported: dict[str, Path], tmp_path: Path, layout: str, weights: str
) -> None:
    folder, mark = copied(exported[layout], tmp_path / "evil"), tmp_path / "RAN"
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save(Evil(mark), folder / weights)
    error = attempt(folder)
    assert isinstance(error, CheckpointError) and "run code" in str(error) and not mark.exists()


@pytest.mark.parametrize("layout", ["timm", "huggingface", "open_clip"])
def test_harmless_pickled_weights_load(exported: dict[str, Path], tmp_path: Path, layout: str) -> None:
    folder = copied(exported[layout], tmp_path / "plain")
    for file in folder.glob("*.safetensors"):
        names = {"timm": "pytorch_model.bin", "huggingface": "pytorch_model.bin", "open_clip": "open_clip_pytorch_model.bin"}
        torch.save(load_file(file), folder / names[layout])
        file.unlink()
    assert attempt(folder) is None


def test_settings_of_the_tokenizer_run_no_python_of_the_folder(exported: dict[str, Path], tmp_path: Path) -> None:
    folder, mark = copied(exported["open_clip"], tmp_path / "evil"), tmp_path / "RAN"
    (folder / "tok.py").write_text(CODE.format(mark=mark))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["tok.T", None]}, "vocab_file": "/etc/passwd"})
    )
    edit(
        folder / "open_clip_config.json",
        lambda d: d["model_cfg"]["text_cfg"].update(
            hf_tokenizer_name="x", tokenizer_kwargs={"trust_remote_code": True, "bpe_path": "/etc/passwd"}
        ),
    )
    peer = load(str(folder), model=None, device=CPU)
    assert peer.subject.cls(torch.zeros(1, 3, 32, 32)).shape == (1, 12), "pictures need no tokenizer"
    assert peer.subject.texts is not None
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        peer.subject.texts(["a dog"])
    assert not mark.exists()


def test_a_plain_tokenizer_file_is_used(exported: dict[str, Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder = copied(exported["open_clip"], tmp_path / "own")
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "dog": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.save(str(folder / "tokenizer.json"))
    edit(folder / "open_clip_config.json", lambda d: d["model_cfg"]["text_cfg"].update(hf_tokenizer_name="x"))
    from pipeline.weights.open_clip_folder import load as load_folder

    tokens = load_folder(folder).tokenize(["a  dog", "a cat"])
    assert tokens.shape == (2, 16) and tokens[:, :3].tolist() == [[2, 3, 0], [2, 1, 0]]
    (folder / "tokenizer.json").write_text('{"model": 3}')
    error = attempt(folder)
    assert error is not None and "tokenizer.json" in str(error)


def _timm_file(folder: Path, evil: Path) -> None:
    edit(folder / "config.json", lambda d: d.setdefault("pretrained_cfg", {}).update(file=str(evil), source="", custom_load=True))


def _timm_hub(folder: Path, evil: Path) -> None:
    edit(
        folder / "config.json",
        lambda d: d["pretrained_cfg"].update(hf_hub_id="evil/evil", source="hf-hub", url="http://127.0.0.1:9/x"),
    )


def _timm_checkpoint(folder: Path, evil: Path) -> None:
    edit(folder / "config.json", lambda d: d["model_args"].update(checkpoint_path=str(evil)))


def _timm_overlay(folder: Path, evil: Path) -> None:
    edit(folder / "config.json", lambda d: d["model_args"].update(pretrained_cfg_overlay={"file": str(evil)}))


def _timm_elsewhere(folder: Path, evil: Path) -> None:
    edit(folder / "config.json", lambda d: d.update(architecture=f"local-dir:{evil.parent}"))


def _auto_map(folder: Path, evil: Path) -> None:
    edit(
        folder / "config.json", lambda d: d.update(auto_map={"AutoModel": "tok.T", "AutoConfig": "tok.T"}, trust_remote_code=True)
    )


def _unknown_type(folder: Path, evil: Path) -> None:
    edit(folder / "config.json", lambda d: d.update(model_type="mine", auto_map={"AutoModel": "tok.T", "AutoConfig": "tok.T"}))


def _kernel(folder: Path, evil: Path) -> None:
    edit(folder / "config.json", lambda d: d.update(_attn_implementation="evil/kernel", attn_implementation="evil/kernel"))


def _quantised(folder: Path, evil: Path) -> None:
    edit(folder / "config.json", lambda d: d.update(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}))


def _adapter(folder: Path, evil: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(evil.parent), "peft_type": "LORA"}))


def _index(folder: Path, evil: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": f"../{evil.name}"}}))


def _hub_tower(folder: Path, evil: Path) -> None:
    edit(
        folder / "open_clip_config.json",
        lambda d: d["model_cfg"]["vision_cfg"].update(timm_model_name=f"local-dir:{evil.parent}", timm_model_pretrained=True),
    )


def _hub_text(folder: Path, evil: Path) -> None:
    edit(folder / "open_clip_config.json", lambda d: d["model_cfg"]["text_cfg"].update(hf_model_name=str(evil.parent)))


INDIRECTIONS: list[tuple[str, Callable[[Path, Path], None], str]] = [
    ("timm", _timm_file, "ignored"),
    ("timm", _timm_hub, "ignored"),
    ("timm", _timm_checkpoint, "is unknown"),
    ("timm", _timm_overlay, "is unknown"),
    ("timm", _timm_elsewhere, "timm has no model"),
    ("huggingface", _auto_map, "ignored"),
    ("huggingface", _unknown_type, "is not supported"),
    ("huggingface", _kernel, "ignored"),
    ("huggingface", _quantised, "ignored"),
    ("huggingface", _adapter, "ignored"),
    ("huggingface", _index, "plain file name"),
    ("open_clip", _hub_tower, "timm_model_name"),
    ("open_clip", _hub_text, "hf_model_name"),
]


@pytest.mark.parametrize(("layout", "change", "answer"), INDIRECTIONS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_indirections_of_a_config_are_not_followed(
    exported: dict[str, Path], tmp_path: Path, layout: str, change: Callable[[Path, Path], None], answer: str
) -> None:
    folder, mark = copied(exported[layout], tmp_path / "evil"), tmp_path / "RAN"
    torch.save(Evil(mark), tmp_path / "pytorch_model.bin")
    (folder / "tok.py").write_text(CODE.format(mark=mark))
    change(folder, tmp_path / "pytorch_model.bin")
    error = attempt(folder)
    assert not mark.exists()
    assert error is None if answer == "ignored" else error is not None and answer in str(error)


@pytest.mark.parametrize("layout", ["timm", "huggingface", "open_clip"])
@pytest.mark.parametrize(
    "value", [1 << 40, -1, 1e308, float("nan"), [1] * 1000, {"a": {"b": 1}}, "/etc/passwd", "x" * 100_000, None, "relu;"]
)
def test_absurd_sizes_are_refused_before_memory_is_taken(
    exported: dict[str, Path], tmp_path: Path, layout: str, value: Any
) -> None:
    keys = {"timm": ("depth", "img_size"), "huggingface": ("hidden_size", "num_hidden_layers"), "open_clip": ("layers", "width")}
    for number, key in enumerate(keys[layout]):
        folder = copied(exported[layout], tmp_path / f"{number}")

        def change(document: dict[str, Any], key: str = key) -> None:
            if layout == "open_clip":
                document["model_cfg"]["vision_cfg"][key] = value
            elif layout == "timm":
                document["model_args"][key] = value
            else:
                document[key] = value

        edit(folder / ("open_clip_config.json" if layout == "open_clip" else "config.json"), change)
        error = attempt(folder)
        assert error is not None or value is None


@pytest.mark.parametrize("document", ["[]", "3", '"x"', "{}", '{"architecture": 3}', '{"model_type": []}', "[" * 100_000, "{"])
def test_a_config_that_is_none_is_refused(tmp_path: Path, document: str) -> None:
    (tmp_path / "config.json").write_text(document)
    with pytest.raises((CheckpointError, ConfigError)):
        load(str(tmp_path), model=None, device=CPU)
    (tmp_path / "open_clip_config.json").write_text(document)
    with pytest.raises((CheckpointError, ConfigError)):
        load(str(tmp_path), model=None, device=CPU)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_first_weights_of_a_run_execute_nothing(tmp_path: Path, suffix: str) -> None:
    file, mark = tmp_path / f"evil{suffix}", tmp_path / "RAN"
    for legacy in (False, True):
        torch.save({"model": Evil(mark)}, file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError, match="run code") as caught:
            weights_of(find(str(file)))
        assert "weights_only" not in str(caught.value) and not mark.exists()
    for rubbish in (b"", b"\x80\x04.", b"PK\x03\x04", b"\x80\x02}q\x00(X\xff\xff\xff\xff", os.urandom(4096)):
        file.write_bytes(rubbish)
        with pytest.raises(CheckpointError):
            weights_of(find(str(file)))


def test_a_library_that_asks_for_pickles_does_not_get_them(tmp_path: Path) -> None:
    file, mark = tmp_path / "evil.pth", tmp_path / "RAN"
    torch.save(Evil(mark), file)
    with only_weights(), pytest.raises(Exception, match=r"."):
        torch.load(file, weights_only=False)
    assert not mark.exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_tensors_that_claim_more_than_the_file_has_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="value in the file for each element"):
        read_tensors(tmp_path / "w.pth")
    endless: dict[str, Any] = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="nested too deeply"):
        read_tensors(tmp_path / "c.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(CheckpointError, match="regular file"):
        read_tensors(tmp_path / "pipe.pth")
    (tmp_path / "h.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        read_tensors(tmp_path / "h.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "good.safetensors")
    assert read_tensors(tmp_path / "good.safetensors", shapes_only=True)["a"].is_meta


class _Zeros:
    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (1 << 34,)


def test_a_small_file_cannot_ask_for_much_memory_or_time(tmp_path: Path) -> None:
    torch.save({"x": _Zeros()}, tmp_path / "zeros.pth")
    torch.save({"x": torch.zeros(1 << 20)}, tmp_path / "plain.pth")
    assert read_tensors(tmp_path / "plain.pth")["x"].numel() == 1 << 20
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))
    many: dict[str, Any] = {"x": torch.zeros(1)}
    for _ in range(7):
        many = {str(number): many for number in range(40)}
    torch.save(many, tmp_path / "many.pth")
    for name, what in {"zeros": "byte array", "packed": "compressed archive", "many": "entries"}.items():
        with pytest.raises(CheckpointError, match=what):
            read_tensors(tmp_path / f"{name}.pth")


# ---- what is loaded ---------------------------------------------------------------------------------------------------------


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("layout", ["timm", "open_clip"])
def test_an_exported_folder_is_the_network_it_came_from(layout: str, tmp_path: Path) -> None:
    saved, method = checkpoint(tmp_path / "run", settings(CLIP))
    peer = load(str(write(read(saved), layout, tmp_path / layout)), model=None, device=CPU)
    tower = method.export()["backbone"]
    assert peer.size == 32 and peer.subject.tower.patch == tower.patch
    with torch.inference_mode():
        expected = method.encode_images(images()) if layout == "open_clip" else tower(images()).cls
        torch.testing.assert_close(peer.subject.embedded(images()), expected, atol=1e-5, rtol=0)
        assert peer.subject.tokens(images()).patches.shape == (2, 16, 32)
        assert peer.subject.layers(images(), 2).shape == (2, 2, 2, 32)
    assert (peer.subject.texts is not None) == (layout == "open_clip")


def test_a_file_needs_the_name_of_its_architecture_and_has_to_fit_it(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(4)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    file = tmp_path / "tiny.safetensors"
    save_file(model.state_dict(), file)
    peer = load(str(file), model="vit_tiny_patch16_224", device=CPU)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(peer.subject.cls(pixels), model.forward_features(pixels)[:, 0])
    with pytest.raises(ConfigError, match="does not name its architecture"):
        load(str(file), model=None, device=CPU)
    for other, told in (("vit_small_patch16_224", "of another shape"), ("resnet18", "not a plain vision transformer")):
        with pytest.raises((CheckpointError, ConfigError), match=told):
            load(str(file), model=other, device=CPU)
    with pytest.raises(CheckpointError, match="neither a run nor weights"):
        load(str(tmp_path), model=None, device=CPU)


def test_a_folder_whose_weights_are_of_another_architecture_is_refused(tmp_path: Path) -> None:
    for name, width in (("narrow", 32), ("wide", 48)):
        write(read(checkpoint(tmp_path / f"run-{name}", settings(DINO, embed_dim=width))[0]), "timm", tmp_path / name)
    (tmp_path / "wide" / "model.safetensors").replace(tmp_path / "narrow" / "model.safetensors")
    with pytest.raises(CheckpointError, match="timm cannot load it"):
        load(str(tmp_path / "narrow"), model=None, device=CPU)
