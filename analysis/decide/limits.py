"""What bounds a run beside its budget: serving, unique tokens, tokens served over its life, a ratio of D to N."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from analysis.inference.repetition import R_TOKENS
from scaling.errors import InputError

WEIGHT_SHARE = 0.7
"""Of the serving devices' memory for weights; the rest holds the key/value cache and activations."""


@dataclass(frozen=True)
class Limits:
    """Bounds on N and D. Two that choose the same thing are refused."""

    max_params: float | None = None
    """N at most, in the fit's convention."""
    max_params_source: str = "max_params"
    """What sets it, for messages."""
    unique_tokens: float | None = None
    """Different tokens at hand; beyond them D repeats and is worth less (Muennighoff et al. 2023)."""
    r_tokens: float | None = None
    """R_D, the decay of a repeated token's worth, as the sweep measured it; None: Muennighoff et al.'s."""
    r_tokens_95: tuple[float, float] | None = None
    """Its interval."""
    max_epochs: float | None = None
    """D at most, over unique_tokens."""
    served_tokens: float = 0.0
    """Tokens that the model serves over its life (Sardana et al. 2023)."""
    serving_weight: float = 1.0
    """What a served FLOP costs over a training FLOP: 1 in FLOPs; in money, training MFU over serving MFU."""
    tokens_per_param: float | None = None
    """D/N."""
    overtrain: float | None = None
    """D/N over the compute-optimal one at the same compute (Gadre et al. 2024)."""

    def __post_init__(self) -> None:
        for name, flag in (
            ("max_params", self.max_params_source), ("unique_tokens", "--unique-tokens"),
            ("max_epochs", "--max-epochs"), ("serving_weight", "--serve-mfu"),
            ("tokens_per_param", "--tokens-per-param"), ("overtrain", "--overtrain"),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{flag} {value:g}: must be a positive number")
        if not 0 <= self.served_tokens < float("inf"):
            raise InputError(f"--served-tokens {self.served_tokens:g}: must not be negative")
        if self.max_epochs is not None and self.unique_tokens is None:
            raise InputError(f"--max-epochs {self.max_epochs:g}: epochs of what? give --unique-tokens too")
        if self.max_epochs is not None and self.max_epochs < 1:
            raise InputError(
                f"--max-epochs {self.max_epochs:g}: at least 1; to use fewer tokens give less --unique-tokens"
            )
        ratio = self.ratio_flag
        if self.overtrain is not None and self.tokens_per_param is not None:
            raise InputError("--overtrain and --tokens-per-param conflict: both choose D/N; give one")
        if ratio and self.served_tokens:
            raise InputError(
                f"{ratio} and --served-tokens conflict: both choose how far past the optimum of training D/N goes; give one"
            )

    @property
    def repetition(self) -> str:
        """Which R_D counts, and where it is from."""
        if self.r_tokens is None or self.r_tokens_95 is None:
            return f"Muennighoff et al.'s (R_D {R_TOKENS:g}), not measured in this sweep"
        return "this sweep's (R_D {:.2g}, 95% {:.2g} to {:.2g})".format(self.r_tokens, *self.r_tokens_95)

    @property
    def ratio_flag(self) -> str | None:
        """The flag that fixes D/N, if one does."""
        return "--overtrain" if self.overtrain else "--tokens-per-param" if self.tokens_per_param else None

    @property
    def max_tokens(self) -> float:
        """D at most."""
        if self.unique_tokens is None or self.max_epochs is None:
            return float("inf")
        return self.unique_tokens * self.max_epochs

    def to_dict(self) -> dict[str, Any]:
        """Those that are set: `Limits(**…)` gives them back."""
        default = {field.name: field.default for field in fields(self)}
        given = {name: value for name, value in asdict(self).items() if value != default[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    def __str__(self) -> str:
        """The limits that are set, with their values."""
        values = {
            self.max_params_source: f"N at most {self.max_params:.4g}" if self.max_params else None,
            "--unique-tokens": f"{self.unique_tokens:.4g}" if self.unique_tokens else None,
            "--max-epochs": f"{self.max_epochs:.3g}" if self.max_epochs else None,
            "--served-tokens": f"{self.served_tokens:.4g}, each at {self.serving_weight:.3g}× the cost of a training FLOP",
            "--overtrain": f"{self.overtrain:.3g}" if self.overtrain else None,
            "--tokens-per-param": f"{self.tokens_per_param:.4g}" if self.tokens_per_param else None,
        }
        return "; ".join(f"{name} ({values[name]})" for name in self.names)

    @property
    def names(self) -> list[str]:
        """The limits that are set, as flags."""
        return [
            flag
            for flag, value in (
                (self.max_params_source, self.max_params), ("--unique-tokens", self.unique_tokens),
                ("--max-epochs", self.max_epochs), ("--served-tokens", self.served_tokens),
                (self.ratio_flag, self.ratio_flag),
            )
            if value and flag
        ]  # fmt: skip


NONE = Limits()


def params_in_memory(memory_bytes: float, bytes_per_param: float) -> float:
    """All parameters whose weights fit WEIGHT_SHARE of the memory of the devices that serve one copy."""
    return WEIGHT_SHARE * memory_bytes / bytes_per_param


def params_in_time(seconds_per_token: float, bandwidth: float, bytes_per_param: float) -> float:
    """The parameters that a token meets, read once in this time: N ≤ seconds·bandwidth / bytes.

    At batch 1 decoding reads each of them for every token, and nothing is faster than that (Pope et al. 2022, arXiv 2211.05102).

    Args:
        bandwidth: bytes a second, of all devices that serve one copy.
    """
    return seconds_per_token * bandwidth / bytes_per_param
