"""The shape of a Decision Transformer, in one place."""

from typing import Literal

from pydantic import Field, model_validator

from dt.frozen import Frozen

Activation = Literal["relu", "gelu_new", "geglu"]


class Architecture(Frozen):
    """Sizes of the trunk and of what feeds it. The default is the paper's: 128 wide, 3 layers, 1 head (§V)."""

    width: int = Field(128, gt=0)
    layers: int = Field(3, gt=0)
    heads: int = Field(1, gt=0)
    activation: Activation = "relu"
    context: int = Field(20, gt=0)  # K: time steps in a window; each gives three tokens (return-to-go, state, action)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "Architecture":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    @property
    def mlp_width(self) -> int:
        """Inner width of the MLP: 4d, or ⌈⅔·4d⌉ for GEGLU so that the gate costs no extra parameters (Shazeer 2020)."""
        return -(-8 * self.width // 3) if self.activation == "geglu" else 4 * self.width


BASE = Architecture()
WIDE = Architecture(width=512, layers=3, heads=4, activation="gelu_new")  # Table V
GPT2_SMALL = Architecture(width=768, layers=12, heads=12, activation="gelu_new")  # Table IV
