"""What every section of the schema shares: strictness, the names of choices, pixel units, a paper's row."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Activation = Literal["relu", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "softplus", "tanh"]
Branch = Literal["clean", "adv"]
BnMode = Literal["eval", "batch", "train"]
AttackDtype = Literal["fp32", "bf16", "fp16"]


def _parse_fraction(value: object) -> object:
    """Accept ``"8/255"`` beside ``8``, because papers write both."""
    if isinstance(value, str) and value.strip().endswith("/255"):
        return float(value.strip()[: -len("/255")])
    return value


Pixels = Annotated[float, BeforeValidator(_parse_fraction)]


class Strict(BaseModel):
    """Base of every section: unknown keys are errors, values are not coerced between types, instances are frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PaperConfig(Strict):
    """The row of a paper's table that a recipe reproduces, with the paper's own numbers (percent)."""

    title: str = Field(description="short name of the paper")
    table: str = Field(description="table, figure or section, e.g. 'Table 8'")
    row: str = Field(default="", description="the row's label as printed")
    numbers: dict[str, float] = Field(
        default_factory=dict, description="metric -> percent, e.g. {clean: 82.52, aa: 48.51}"
    )
    note: str = Field(default="", description="contradictions between text and code, and which one this recipe follows")
