"""Every hyper-parameter of a training run, in one typed record."""

from typing import Literal

from pydantic import Field

from dt.frozen import Frozen

Precision = Literal["float32", "bfloat16"]


class Optimisation(Frozen):
    """How a policy is trained. The defaults are the paper's (§V and the original code): 100k steps at lr 1e-4."""

    steps: int = Field(100_000, gt=0)
    batch_size: int = Field(64, gt=0)  # windows a step
    learning_rate: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(10_000, ge=0)  # linear, from 0
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine: to 0 after the last step
    weight_decay: float = Field(1e-4, ge=0)
    clip_norm: float = Field(0.25, gt=0)  # global gradient norm
    # Deviation of the time-step table's rows at the start; None: PyTorch's N(0, 1), as in the original. That is as loud
    # as the tokens it is added to: with GPT-2's 0.02 the loss falls about three times faster.
    timestep_std: float | None = Field(None, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)  # embeddings, attention and both residual branches
    precision: Precision = "float32"  # of the matrix products; parameters and optimiser state stay float32
