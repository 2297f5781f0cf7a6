"""Loads open_clip model folders safely, with its own parser of ``open_clip_config.json``.

open_clip passes settings of that file to transformers, which imports Python files on request, and takes paths from it. Here
the file only provides sizes; text is tokenized by open_clip's own tokenizer or by a plain ``tokenizer.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.sizes import Size
from pipeline.errors import CheckpointError, ConfigError
from pipeline.untrusted import printable, read_bytes, read_json
from pipeline.weights.folder_config import Settings, image_sizes, read_settings, three

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
_TOKENIZER_BYTES = 256 << 20
_CLEANINGS = ("lower", "whitespace", "canonicalize")


@dataclass(frozen=True)
class OpenClipFolder:
    """A model loaded from such a folder.

    Attributes:
        folder: the folder.
        model: open_clip's model with the weights.
        size: side, or height and width, of its images in pixels.
        mean, std: of its images, as fractions of full intensity.
        text: the validated settings of its text tower.
    """

    folder: Path
    model: nn.Module
    size: Size
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    text: Settings

    @cached_property
    def tokenize(self) -> Callable[[list[str]], Tensor]:
        """Function from sentences to tokens ``[n, context]`` int64; created on first use.

        Raises:
            CheckpointError: the folder's tokenizer is not one of open_clip's and has no ``tokenizer.json``.
        """
        context = int(self.text.values.get("context_length", 77))
        options = self.text.other.get("tokenizer_kwargs") or {}
        clean = options.get("clean") if isinstance(options, dict) else None
        if clean is not None and clean not in _CLEANINGS:
            raise CheckpointError(
                f"tokenizer_kwargs.clean must be one of {', '.join(_CLEANINGS)}",
                where=str(self.folder / CONFIG),
                hint="Export the model to timm's layout",
            )
        if not self.text.other.get("hf_tokenizer_name"):
            from open_clip.tokenizer import SimpleTokenizer

            simple: Any = SimpleTokenizer(context_length=context, **({"clean": clean} if clean else {}))
            return lambda sentences: simple(sentences)
        return _fast_tokenizer(self.folder, context, clean or "whitespace", int(self.text.values.get("pad_id", 0)))


def _fast_tokenizer(folder: Path, context: int, clean: str, pad: int) -> Callable[[list[str]], Tensor]:
    """The tokenizer of ``tokenizer.json``, which is pure data; ignores a tokenizer class or ``auto_map`` of the folder."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError(
            "tokenizers is not installed", where=str(folder), hint="Install it: pip install 'fovea[export]'"
        ) from error
    import torch
    from open_clip.tokenizer import get_clean_fn

    file = folder / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(
            "its tokenizer is not open_clip's own, and there is no tokenizer.json",
            where=str(folder),
            hint="Save it with tokenizers' Tokenizer.save; Python code of the folder is not run",
        )
    try:
        made = Tokenizer.from_buffer(read_bytes(file, limit=_TOKENIZER_BYTES, error=CheckpointError))
        made.enable_truncation(context)
        made.enable_padding(length=context, pad_id=pad)
    except CheckpointError:
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise CheckpointError(
            f"cannot be read ({printable(str(error), limit=120)})", where=str(file), hint="Download the folder again"
        ) from None
    cleaned = get_clean_fn(clean)

    def tokenize(sentences: list[str]) -> Tensor:
        return torch.tensor([line.ids for line in made.encode_batch([cleaned(text) for text in sentences])], dtype=torch.long)

    return tokenize


def load(folder: Path) -> OpenClipFolder:
    """Loads a folder, strictly.

    Raises:
        CheckpointError: its settings are not of a model that open_clip builds on its own, or the weights do not fit.
    """
    import torch
    from open_clip.model import (
        CLIP,
        CLIPTextCfg,
        CLIPVisionCfg,
        CustomTextCLIP,
        convert_to_custom_text_state_dict,
    )

    from pipeline.models.tensor_files import read_folder, reason

    file = folder / CONFIG
    document = read_json(file, error=CheckpointError)
    about = document.get("model_cfg") if isinstance(document, dict) else None
    if (
        not isinstance(about, dict)
        or not isinstance(about.get("vision_cfg"), dict)
        or not isinstance(about.get("text_cfg"), dict)
    ):
        raise CheckpointError(
            "must contain model_cfg with vision_cfg and text_cfg", where=str(file), hint="Download the folder again"
        )
    where = str(file)
    vision = read_settings(about["vision_cfg"], CLIPVisionCfg, where=where, never=("timm_model",))
    beside = ("hf_tokenizer_name", "tokenizer_")
    text = read_settings(about["text_cfg"], CLIPTextCfg, where=where, never=("hf_model",), other=beside)
    model_settings = read_settings(about, CustomTextCLIP.__init__, where=where, other=("vision_cfg", "text_cfg", "custom_text"))
    custom = about.get("custom_text") is True
    make = CustomTextCLIP if custom else CLIP
    arguments = {**model_settings.values, "vision_cfg": vision.values, "text_cfg": text.values}
    state = read_folder(folder, _WEIGHTS)
    inner = state.get("state_dict")
    state = {name.removeprefix("module."): t for name, t in (inner if isinstance(inner, dict) else state).items()}
    state = convert_to_custom_text_state_dict(state) if custom else state
    try:
        with torch.device("meta"):
            shapes = make(**arguments).state_dict()
        wrong = sorted(shapes.keys() ^ state.keys()) or [
            n for n, t in shapes.items() if t.numel() != state[n].numel() or (t.ndim and t.shape != state[n].shape)
        ]
        if not wrong:
            model = make(**arguments)
            model.load_state_dict({name: tensor.reshape(shapes[name].shape) for name, tensor in state.items()})
    except Exception as error:  # open_clip validates with assertions, and invalid sizes raise arithmetic errors
        raise CheckpointError(
            f"open_clip cannot load it ({reason(error)})", where=str(folder), hint="Give a complete folder"
        ) from None
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} weights do not match, the first is {printable(wrong[0], limit=80)}",
            where=str(folder),
            hint="Give a complete folder",
        )
    mean, std = _preprocessing(document.get("preprocess_cfg"), where)
    size = image_sizes(document, where=where).images or 224
    return OpenClipFolder(folder, model, size, mean, std, text)


def _preprocessing(settings: Any, where: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    about = settings if isinstance(settings, dict) else {}
    return (
        three(about.get("mean", (0.48145466, 0.4578275, 0.40821073)), where=where),
        three(about.get("std", (0.26862954, 0.26130258, 0.27577711)), where=where, positive=True),
    )
