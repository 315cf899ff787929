"""The settings of MetaMask: their defaults, what is allowed, and what they do.

They stand under ``method_kwargs`` in a YAML file of solo-learn's GitHub main, and are keyword
arguments of ``MetaMask`` on 1.0.2 (``mask`` and ``meta`` are mappings there). Errors, the help and
docs/settings.md take their words from here. Imports no torch, since ``--help`` reads it.
"""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from metamask_solo.method import Kind, Method
from metamask_solo.validation import Settings, fields, shown

# BatchNorm over two images has no derivative but for its eps, over three hardly one: in single
# precision the hypergradient of a ResNet-18 is off by 110 %, 84 %, 12 % and 3 % with two to five
# images before any step (τ = 0.07)
LEAST_IMAGES = 4


class MaskSettings(Settings):
    """The mask and its optimiser."""

    kind: Kind = Field(
        "sigmoid", description="sigmoid: m = 1 / (1 + exp(-a)) of the logits a; linear: m = a"
    )
    initial_logit: float | None = Field(
        None, description="where all logits start; null: 0 for sigmoid (m = 0.5), 1 for linear"
    )
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="optimiser of the mask")
    lr: float = Field(1e-3, ge=0, description="learning rate of the mask")
    momentum: float = Field(
        0.9, ge=0, lt=1, description="momentum of the mask's sgd, or first beta of its adam"
    )
    weight_decay: float = Field(5e-4, ge=0, description="weight decay of the mask's logits")
    schedule: Literal["fixed", "cosine"] = Field(
        "fixed", description="fixed: a constant rate; cosine: the rate falls to 0 over the run"
    )
    clip_grad: float | None = Field(
        None, gt=0, description="largest norm of the hypergradient; null: it is not clipped"
    )

    @field_validator("initial_logit")
    @classmethod
    def _logit_has_a_gradient(cls, logit: float | None, info: ValidationInfo) -> float | None:
        """In single precision σ'(a) is off by 0.1 % at 10, by 18 % at 15, and exactly 0 from 17."""
        kind = info.data.get("kind")
        if logit is not None and kind == "sigmoid" and abs(logit) > 10:
            raise ValueError("must lie within -10 and 10 with mask.kind=sigmoid")
        if logit is not None and kind == "linear" and not 1e-3 <= abs(logit) <= 1e3:
            raise ValueError("must be of a size from 0.001 to 1000 with mask.kind=linear")
        return logit


class MetaSettings(Settings):
    """The meta-update: how and when the mask's gradient is computed."""

    enabled: bool = Field(True, description="false: the mask stays where it starts")
    hypergradient: Literal[Method, "plain"] = Field(
        "exact",
        description="how the mask's gradient is computed; finite_difference is the official code's "
        "way, first_order leaves out how the trial step depends on the mask, plain takes no trial "
        "step",
    )
    radius: float = Field(
        1e-2, gt=0, description="finite_difference only: how far the weights move to either side"
    )
    trial_lr: float | None = Field(
        None,
        ge=0,
        description="null: the trial step is the optimiser's own next step; a number: a "
        "gradient step with this rate (needed with lars: 1e-3 to start with)",
    )
    every_n_steps: int = Field(1, ge=1, description="the mask is updated after every n-th step")
    trial_scope: Literal["all", "heads"] = Field(
        "all",
        description="all: the trial step moves backbone and contrastive head; heads: the "
        "contrastive head alone, on features already computed, which is much cheaper",
    )
    batch_fraction: float = Field(
        1.0, gt=0, le=1, description="part of the batch that the mask update uses"
    )


class MetaMaskSettings(Settings):
    """All settings of the method."""

    proj_hidden_dim: int = Field(
        2048,
        ge=1,
        description="size of both hidden layers of the redundancy-reduction head",
    )
    proj_output_dim: int = Field(
        2048, ge=1, description="output size of the redundancy-reduction head"
    )
    contrastive_hidden_dim: int = Field(
        2048, ge=1, description="hidden size of the contrastive head (two layers)"
    )
    contrastive_output_dim: int = Field(
        256, ge=1, description="output size of the contrastive head"
    )
    lamb: float = Field(
        0.005, ge=0, description="off-diagonal weight of the redundancy (Barlow Twins) loss"
    )
    scale_loss: float = Field(1.0, ge=0, description="factor of the whole redundancy loss")
    # below 0.02, exp(1 / temperature) leaves the range of single precision
    temperature: float = Field(
        0.07, ge=0.02, le=100, description="temperature of the contrastive (NT-Xent) loss"
    )
    alpha: float = Field(
        10.0, ge=0, description="weight of the contrastive loss in the regular step"
    )
    mask: MaskSettings = MaskSettings()
    meta: MetaSettings = MetaSettings()


SETTINGS = dict(fields(MetaMaskSettings))


def idle_settings(settings: MetaMaskSettings, steps: float, batch_size: int) -> list[str]:
    """Settings with which the mask never moves, or that another setting switches off, and why.

    Args:
        settings: the settings of a run.
        steps: steps of the network in the whole run, infinity where nobody knows.
        batch_size: images of a batch of one process.
    """
    meta = settings.meta
    cases = {
        f"meta.every_n_steps={meta.every_n_steps} (the run has {steps} steps)": (
            meta.enabled and meta.every_n_steps > steps
        ),
        f"optimizer.batch_size={batch_size}, meta.batch_fraction={meta.batch_fraction:g} (the mask "
        f"moves on {LEAST_IMAGES} images or more)": (
            meta.enabled and round(meta.batch_fraction * batch_size) < LEAST_IMAGES
        ),
        f"meta.radius={shown(meta.radius)} (only finite_difference uses it)": (
            meta.radius != MetaSettings().radius and meta.hypergradient != "finite_difference"
        ),
        f"meta.trial_lr={shown(meta.trial_lr)} (plain takes no trial step)": (
            meta.trial_lr is not None and meta.hypergradient == "plain"
        ),
    }
    return [words for words, idle in cases.items() if idle]
