"""What settings are made of: lengths of training, ranges, texts, and the strict base class of every section."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

# A field marked so changes neither the samples nor the mathematics of a run: a resume may change it freely.
RUNTIME: dict[str, Any] = {"runtime": True}


@dataclass(frozen=True)
class Length:
    """A stretch of training: a number of samples, of optimizer steps, or of passes over the data.

    In a config: ``1500000``, ``1.5M samples``, ``500 steps`` or ``3 epochs``. ``k``, ``M`` and ``G`` are 1e3, 1e6 and 1e9.
    """

    amount: float
    unit: Literal["samples", "steps", "epochs"] = "samples"

    SYNTAX = "a number of samples, or text such as '3 epochs', '500 steps', '1.5M samples'"

    @classmethod
    def parse(cls, value: object) -> Length:
        """Reads what a person wrote.

        Raises:
            ValueError: if it is no length, negative, or a fraction of a sample or of a step.
        """
        if isinstance(value, Length):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(f"should be {cls.SYNTAX}")
        match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([kMG]?)\s*(samples?|steps?|epochs?)?\s*", str(value))
        try:
            amount = float(match[1]) * {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]] if match else -1.0
        except ValueError:
            amount = -1.0
        if match is None or not 0 <= amount < 1e18:
            raise ValueError(f"should be {cls.SYNTAX}")
        unit = ((match[3] or "samples").rstrip("s") + "s").strip()
        if unit != "epochs" and abs(amount - round(amount)) > 1e-6:
            raise ValueError(f"should be a whole number of {unit}")
        return cls(amount if unit == "epochs" else float(round(amount)), unit)  # type: ignore[arg-type]

    def samples(self, epoch_samples: int, global_batch: int) -> int:
        """The length in samples, rounded to the nearest.

        Args:
            epoch_samples: samples of one pass over the data.
            global_batch: samples of one optimizer step over all ranks.
        """
        return round(self.amount * {"samples": 1, "steps": global_batch, "epochs": epoch_samples}[self.unit])

    def steps(self, epoch_samples: int, global_batch: int) -> int:
        """The least whole number of optimizer steps that covers the length."""
        return -(-self.samples(epoch_samples, global_batch) // global_batch)

    def __str__(self) -> str:
        number = repr(self.amount).removesuffix(".0") if self.amount < 1e15 else str(int(self.amount))
        return number if self.unit == "samples" else f"{number} {self.unit}"

    def plain(self) -> int | str:
        """The form a config holds: an integer for samples, text otherwise."""
        return int(self.amount) if self.unit == "samples" else str(self)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(cls.plain)
        )


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"should be [least, largest], but {pair[0]} is above {pair[1]}")
    return pair


def _texts(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
ShareRange = Annotated[tuple[Share, Share], AfterValidator(_ordered)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]


class Settings(BaseModel):
    """Base of all sections: frozen, unknown keys refused, no infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
