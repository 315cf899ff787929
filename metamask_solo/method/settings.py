"""The settings of MetaMask: their defaults, what is allowed, and what they do.

They stand under ``method_kwargs`` in a YAML file of solo-learn's GitHub main, and are keyword
arguments of ``MetaMask`` on 1.0.2 (``mask`` and ``meta`` are mappings there). Errors, the help and
docs/settings.md take their words from here.
"""

from functools import reduce
from typing import Annotated, Literal

from pydantic import ValidationInfo, field_validator

from metamask_solo.method.names import Kind, Method
from metamask_solo.validation import (
    Allowed,
    Number,
    Settings,
    about,
    allowed,
    fields,
    refusal,
    shown,
)

# where the logit's derivative is still right in single precision, and above BatchNorm's eps:
# σ(a) (1 − σ(a)) is off by 0.1 % at 10, by 18 % at 15, and exactly 0 from 17
LARGEST_SIGMOID_LOGIT = 10.0
SMALLEST_LINEAR_LOGIT, LARGEST_LINEAR_LOGIT = 1e-3, 1e3


class MaskSettings(Settings):
    """The mask and its optimiser."""

    kind: Kind = about("sigmoid: m = 1 / (1 + exp(-a)) of the logits a; linear: m = a", "sigmoid")
    initial_logit: Annotated[
        Number | None,
        Allowed("a number within ±10 (sigmoid), or of a size from 0.001 to 1000 (linear)"),
    ] = about("where all logits start; null: 0 for sigmoid (m = 0.5), 1 for linear (m = 1)", None)
    optimizer: Literal["sgd", "adam"] = about("optimiser of the mask", "sgd")
    lr: Number = about("learning rate of the mask", 1e-3, ge=0)
    momentum: Number = about(
        "momentum of the mask's sgd; of its adam, the first beta", 0.9, ge=0, lt=1
    )
    weight_decay: Number = about("weight decay of the mask's logits", 5e-4, ge=0)
    schedule: Literal["fixed", "cosine"] = about(
        "fixed: a constant rate; cosine: the rate falls to 0 over the run", "fixed"
    )
    clip_grad: Number | None = about(
        "largest norm of the hypergradient; null: it is not clipped", None, gt=0
    )

    @field_validator("initial_logit")
    @classmethod
    def _has_a_gradient(cls, logit: float | None, info: ValidationInfo) -> float | None:
        kind = info.data.get("kind")
        if logit is None or kind is None:  # a wrong kind is an error of its own
            return logit
        fits = "where single precision still has its gradient"
        if kind == "linear":
            good = SMALLEST_LINEAR_LOGIT <= abs(logit) <= LARGEST_LINEAR_LOGIT
            range_ = f"be of a size from {SMALLEST_LINEAR_LOGIT:g} to {LARGEST_LINEAR_LOGIT:g}"
        else:
            good = abs(logit) <= LARGEST_SIGMOID_LOGIT
            range_ = f"lie within -{LARGEST_SIGMOID_LOGIT:g} and {LARGEST_SIGMOID_LOGIT:g}"
        if not good:
            raise refusal(f"must {range_} with mask.kind={kind}, {fits}")
        return logit


class MetaSettings(Settings):
    """The meta-update: how and when the mask's gradient is computed."""

    enabled: bool = about("false: the mask stays where it starts", True)
    hypergradient: Literal[Method, "plain"] = about(
        "how the mask's gradient is computed; finite_difference is the official code's "
        "way, first_order leaves out how the trial step depends on the mask, plain takes no trial "
        "step",
        "exact",
    )
    radius: Number = about(
        "finite_difference only: how far the weights move to either side", 1e-2, gt=0
    )
    trial_lr: Number | None = about(
        "rate of the trial step; null: the rate in force, where the optimiser is SGD", None, ge=0
    )
    trial_momentum: bool = about("whether the trial step uses the momentum buffers", True)
    trial_weight_decay: bool = about("whether the trial step uses the weight decay", True)
    every_n_steps: int = about("the mask is updated after every n-th step", 1, ge=1)
    trial_scope: Literal["all", "heads"] = about(
        "all: the trial step moves backbone and contrastive head; heads: the "
        "contrastive head alone, on features already computed, which is much cheaper",
        "all",
    )
    batch_fraction: Number = about("part of the batch that the mask update uses", 1.0, gt=0, le=1)


class MetaMaskSettings(Settings):
    """All settings of the method."""

    proj_hidden_dim: int = about(
        "hidden size, twice, of the redundancy-reduction head (three layers)", 2048, ge=1
    )
    proj_output_dim: int = about("output size of the redundancy-reduction head", 2048, ge=1)
    contrastive_hidden_dim: int = about(
        "hidden size of the contrastive head (two layers)", 2048, ge=1
    )
    contrastive_output_dim: int = about("output size of the contrastive head", 256, ge=1)
    lamb: Number = about("off-diagonal weight of the redundancy (Barlow Twins) loss", 0.005, ge=0)
    scale_loss: Number = about("factor of the whole redundancy loss", 1.0, ge=0)
    # below 0.02, exp(1 / temperature) leaves the range of single precision
    temperature: Number = about(
        "temperature of the contrastive (NT-Xent) loss", 0.07, ge=0.02, le=100
    )
    alpha: Number = about("weight of the contrastive loss in the regular step", 10.0, ge=0)
    mask: MaskSettings = MaskSettings()
    meta: MetaSettings = MetaSettings()


SETTINGS = dict(fields(MetaMaskSettings))


def describe_settings() -> str:
    """The settings as text, one a line: name, default, what is allowed, what it is for."""
    return "\n".join(
        f"{name} = {shown(field.default)}: {field.description} ({allowed(field)})"
        for name, field in SETTINGS.items()
    )


def idle_settings(settings: MetaMaskSettings, steps: float, sgd: bool) -> list[str]:
    """Settings that differ from their default, or forbid the mask to move, and do nothing.

    Args:
        settings: the settings of a run.
        steps: steps of the network in the whole run, infinity where nobody knows.
        sgd: whether the network's optimiser is SGD.

    Returns:
        For each a few words: the setting, and why.
    """
    mask, meta = settings.mask, settings.meta
    found = []

    def idle(key: str, why: str, always: bool = False) -> None:
        value = reduce(getattr, key.split("."), settings)
        if always or value != SETTINGS[key].default:
            found.append(f"{key}={shown(value)} ({why})")

    if settings.alpha == settings.scale_loss == 0:
        found.append("alpha=0 and scale_loss=0 (the network learns nothing)")
    elif settings.scale_loss == 0:
        idle("lamb", "scale_loss is 0")
    if not meta.enabled:
        for key in SETTINGS:
            if key.startswith(("mask.", "meta.")) and key not in (
                "meta.enabled",
                "mask.kind",
                "mask.initial_logit",
            ):
                idle(key, "meta.enabled is false")
        return found
    if meta.every_n_steps > steps:
        idle("meta.every_n_steps", f"the run has {int(steps)} steps, so the mask never moves", True)
    if mask.lr == 0:
        idle("mask.lr", "the mask never moves", True)
    if meta.hypergradient != "finite_difference":
        idle("meta.radius", "only finite_difference uses it")
    if meta.hypergradient == "plain":
        for name in ("trial_lr", "trial_momentum", "trial_weight_decay"):
            idle(f"meta.{name}", "hypergradient is plain, without a trial step")
    elif meta.trial_lr == 0:
        idle("meta.trial_lr", "no trial step: the plain gradient at the trial step's cost", True)
    if not sgd:
        idle("meta.trial_momentum", "only SGD's momentum can take part")
    return found
