"""The base of every description that is passed around: immutable, typed, unknown fields forbidden."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """An immutable, validated record; two with equal fields are equal and hash alike."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
