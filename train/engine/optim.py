"""Optimizers and their parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from scaling.spec import OptimSpec
from scaling.transfer import Multipliers
from train.engine.muon import Muon, by_shape
from train.model.decoder import UNSCALED
from train.model.precision import compute_dtype

if TYPE_CHECKING:
    from train.engine.parallel.mesh import Mesh

Named = list[tuple[str, nn.Parameter]]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's states of a parameter's size."""
GROUPS = ("embedding", "layers", "head", "norms")
"""Of parameters, whose updates are measured apart."""
UPDATES_EVERY = 10
"""Steps from one measured update to the next: the others do not wait for the device."""


class Parameters(Protocol):
    """A model, or a rank's part of one."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...


def parameter_groups(model: Parameters) -> tuple[Named, Named, Named]:
    """The layers' matrices, the head, and the rest (embedding and norms)."""
    layers, head, rest = Named(), Named(), Named()
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            layers.append((name, parameter))
        elif name == "lm_head.weight":
            head.append((name, parameter))
        else:
            rest.append((name, parameter))
    return layers, head, rest


def group_of(name: str, parameter: nn.Parameter) -> str:
    """Which of GROUPS a parameter belongs to."""
    if parameter.ndim == 1:
        return "norms"
    return "embedding" if "embed_tokens" in name else "head" if name == "lm_head.weight" else "layers"


class Optimizers:
    """The optimizers of one run, stepped together: AdamW alone, or Muon on the layers' matrices and AdamW on the rest.

    Weight decay (decoupled) applies to the layers' matrices and the head, not to embeddings and norms; with tied
    embeddings the shared matrix has none.

    Muon (Jordan et al. 2024) orthogonalises the momentum of each matrix by Newton–Schulz; its update is scaled to
    AdamW's root mean square, .2·√max(rows, columns) (Liu et al. 2025, arXiv 2502.16982), so one peak_lr serves both.

    Args:
        mesh: where the parameters are sharded; None: they are whole.
        multipliers: of a run whose hyperparameters are another shape's.
    """

    def __init__(
        self,
        model: Parameters,
        spec: OptimSpec,
        precision: str,
        mesh: Mesh | None = None,
        multipliers: Multipliers = UNSCALED,
    ) -> None:
        self.spec = spec
        layers, head, rest = parameter_groups(model)
        muon = spec.name == "muon"
        decay, ratio = spec.weight_decay, spec.adamw_lr_ratio if muon else 1.0
        self._named = head + ([] if muon else layers) + rest
        groups, self._lr_factors = self._groups(head, [] if muon else layers, rest, multipliers)
        self.adamw_ratio, self.muon_factor = ratio, multipliers.muon_lr
        decay /= multipliers.muon_lr
        self.mesh = mesh
        self.measures = False
        """Whether the next step's updates are measured, for `update_ratios`."""
        self._squares: Tensor | None = None
        self._group = {p: GROUPS.index(group_of(name, p)) for name, p in (*head, *layers, *rest)}
        self.adamw = torch.optim.AdamW(
            groups,
            lr=spec.peak_lr,
            betas=(spec.beta1, spec.beta2),
            eps=spec.eps,
            fused=True,
        )
        self._matrices = layers if muon else []
        self.muon: Muon | Any = None
        if muon and mesh is None:
            self.muon = Muon([p for _, p in layers], spec.momentum, decay, compute_dtype(precision))
        elif muon and mesh is not None:
            from train.engine.parallel.muon import ShardedMuon

            self.muon = ShardedMuon(layers, spec.momentum, decay, compute_dtype(precision), mesh)

    def _groups(
        self, head: Named, layers: Named, rest: Named, by: Multipliers
    ) -> tuple[list[dict[str, Any]], list[float]]:
        """AdamW's groups in the order of head + layers + rest, and the factor of each group's learning rate."""
        decay, eps = self.spec.weight_decay, self.spec.eps
        parts: list[tuple[Named, float, float, float]] = [(head + layers, decay, 1.0, eps), (rest, 0.0, 1.0, eps)]
        if by != UNSCALED:
            runs = groupby(rest, key=lambda named: ".layers." in named[0])
            others = [(list(run), 0.0, 1.0, eps * (by.layer_eps if inside else by.eps)) for inside, run in runs]
            parts = [(head, decay, 1.0, eps * by.eps), (layers, decay / by.adamw_lr, by.adamw_lr, eps * by.layer_eps)]
            parts += others
        parts = [part for part in parts if part[0]]
        groups = [{"params": [p for _, p in named], "weight_decay": wd, "eps": e} for named, wd, _, e in parts]
        return groups, [factor for _, _, factor, _ in parts]

    def step(self, lr_factor: float) -> None:
        """One update at lr_factor × peak_lr; gradients are cleared."""
        lr = self.spec.peak_lr * lr_factor
        for group, factor in zip(self.adamw.param_groups, self._lr_factors, strict=True):
            group["lr"] = lr * self.adamw_ratio * factor
        self.adamw.step()
        self._squares = None
        if self.measures:
            self._squares = torch.zeros(2, len(GROUPS), dtype=torch.float64, device=next(iter(self._group)).device)
        if self.muon is not None:
            of_layers = None if self._squares is None else self._squares[0, GROUPS.index("layers")]
            self.muon.step(lr * self.muon_factor, of_layers)
        self.clear_gradients()
        if self._squares is not None:
            self._measure(self._squares)

    @torch.no_grad()
    def _measure(self, squares: Tensor) -> None:
        """Add Σ update² of what AdamW stepped, and Σ weight² of all parameters, by group.

        AdamW's update is lr·m̂/(√v̂ + ε), m̂ = m/(1 − β1ᵗ), v̂ = v/(1 − β2ᵗ) (Loshchilov & Hutter 2019, arXiv 1711.05101),
        which the states after the step still say: no copy of the weights is needed.
        """
        part, copies = _parts(self.mesh)
        for group in self.adamw.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                held = self.adamw.state[parameter]
                first, second = (part(held[kind]) for kind in MOMENTS)
                root = (second / (1 - beta2 ** held["step"])).sqrt_().add_(group["eps"])
                update = (first / root).mul_(group["lr"] / (1 - beta1 ** held["step"]))
                squares[0, self._group[parameter]] += update.square_().sum() / copies(parameter)
        for parameter, number in self._group.items():
            squares[1, number] += part(parameter).square().sum() / copies(parameter)

    def update_ratios(self) -> dict[str, float]:
        """Root mean square of the last step's update over that of the weights, by group; empty where it was not measured.

        Without weight decay's part. Reading it waits for the device; every rank calls it together.
        """
        if self._squares is None:
            return {}
        squares = self._squares.cpu()
        if self.mesh is not None:
            torch.distributed.all_reduce(squares)
        ratios = (squares[0] / squares[1]).sqrt().tolist()
        return {f"update_ratio_{name}": ratio for name, ratio in zip(GROUPS, ratios, strict=True) if ratio == ratio}

    def clear_gradients(self) -> None:
        """Drop every gradient."""
        for _, parameter in (*self._named, *self._matrices):
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The optimizers' states."""
        return {"adamw": self.adamw.state_dict(), "muon": None if self.muon is None else self.muon.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; also what `named_states` gave."""
        if "named" in state:
            self.load_named(state["named"], state["steps"])
            return
        self.adamw.load_state_dict(state["adamw"])
        if self.muon is not None:
            self.muon.load_state_dict(state["muon"])

    def named_states(self) -> dict[str, Tensor]:
        """Every state of a parameter's size under KIND/NAME, in the parameter's own orientation: views, to read or fill."""
        states: dict[str, Tensor] = {}
        for name, parameter in self._named:
            held = self.adamw.state[parameter]
            if not held:
                held["step"] = torch.zeros((), device=parameter.device)
                held |= {kind: torch.zeros_like(parameter, requires_grad=False) for kind in MOMENTS}
            states |= {f"{kind}/{name}": held[kind] for kind in MOMENTS}
        if self.muon is not None:
            names = (name for name, _ in self._matrices)
            states |= {f"momentum/{name}": moment for name, moment in zip(names, self.muon.moments(), strict=True)}
        return states

    @property
    def steps(self) -> float:
        """AdamW's count of updates, for its bias corrections."""
        return max((float(held["step"]) for held in self.adamw.state.values()), default=0.0)

    def load_named(self, states: Mapping[str, Tensor], steps: float) -> None:
        """Fill `named_states` and `steps`."""
        for key, state in self.named_states().items():
            state.copy_(states[key])
        self.set_steps(steps)

    def set_steps(self, steps: float) -> None:
        """Set AdamW's count of updates."""
        for held in self.adamw.state.values():
            held["step"].fill_(steps)


def _parts(mesh: Mesh | None) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], int]]:
    """What this rank holds of a tensor, and how many ranks hold each value of a parameter."""
    if mesh is None:
        return lambda tensor: tensor, lambda parameter: 1
    from train.engine.parallel.shards import copies, local_part

    return local_part, copies


def named_states(state: Mapping[str, Any], model: Parameters, spec: OptimSpec) -> tuple[dict[str, Tensor], float]:
    """`Optimizers.state_dict()` of one process as `Optimizers.named_states()` and `steps`, whole tensors.

    Args:
        model: the whole model, of which names and shapes are read.
    """
    layers, head, rest = parameter_groups(model)
    adamw = state["adamw"]["state"]
    is_muon = spec.name == "muon"
    named = head + ([] if is_muon else layers) + rest
    states = {f"{kind}/{name}": adamw[n][kind] for n, (name, _) in enumerate(named) for kind in MOMENTS}
    if is_muon:
        for group, buffer in zip(by_shape(p for _, p in layers), state["muon"]["buffers"], strict=True):
            for index, moment in zip(group, buffer, strict=True):
                name, parameter = layers[index]
                states[f"momentum/{name}"] = moment if parameter.shape == moment.shape else moment.mT
    return states, float(adamw[0]["step"])
