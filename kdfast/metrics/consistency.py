"""How much of a feature is rebuilt by each order of a Trans-Net, and how much is not.

Liang, Li, Li, Wang, Zhang, "Knowledge Consistency between Neural Networks and Beyond", ICLR 2020.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from kdfast.errors import UserError


class VarianceReport:
    """Variances of the orders x^(n), of their sum g, of the target t and of the residual t - g.

    Of each quantity and channel, the population variance over images and positions, then the mean
    over channels (`mean_scope="channel"`, the published tables), or the variance over all elements
    ("global", which adds the variance of the channel means). One pass, float64, memory independent
    of the data; merging parts is exact, so neither batches nor processes change the result.

    Raises:
        ValueError: another `mean_scope`, or fewer than one order.
    """

    def __init__(self, num_orders: int, mean_scope: str = "channel"):
        if num_orders < 1 or mean_scope not in ("channel", "global"):
            raise ValueError(
                "VarianceReport needs at least one order and mean_scope channel or global, got "
                f"{num_orders} and {mean_scope!r}"
            )
        self.num_orders, self.mean_scope = num_orders, mean_scope
        self.parts = [f"order{n}" for n in range(num_orders)] + ["residual"]
        self.names = [*self.parts, "target", "output"]
        # Products that are summed: each quantity with itself, parts with one another.
        self.pairs = [(name, name) for name in self.names]
        self.pairs += list(itertools.combinations(self.parts, 2))
        self.images = self.positions = 0
        self.sums: Tensor | None = None  # [names + pairs, C] means, then centred products

    def update(self, orders: Tensor, target: Tensor) -> None:
        """Add images: orders [K, N, C, ...], target [N, C, ...], of any floating dtype.

        Raises:
            ValueError: shapes that do not match one another or what came before.
        """
        if orders.shape != (self.num_orders, *target.shape) or target.ndim < 2:
            raise ValueError(
                f"orders must be [{self.num_orders}, N, C, ...] and target [N, C, ...] of the same "
                f"sizes, got {list(orders.shape)} and {list(target.shape)}"
            )
        positions = target.shape[2:].numel()
        if self.sums is not None and (self.sums.shape[1], self.positions) != (
            target.shape[1],
            positions,
        ):
            raise ValueError(
                f"features of {target.shape[1]} channels and {positions} positions came after "
                f"{self.sums.shape[1]} and {self.positions}"
            )
        if not len(target):
            return
        values = dict(zip(self.parts, orders.detach().double(), strict=False))
        values["target"], values["output"] = target.detach().double(), sum(values.values())
        values["residual"] = values["target"] - values["output"]
        rows = {name: values[name].transpose(0, 1).flatten(1) for name in self.names}  # [C, N*P]
        means = {name: row.mean(1, keepdim=True) for name, row in rows.items()}
        centred = {name: row - means[name] for name, row in rows.items()}
        products = [(centred[a] * centred[b]).sum(1) for a, b in self.pairs]
        sums = torch.stack([*(means[name][:, 0] for name in self.names), *products])
        self._add(len(target), positions, sums)

    def merge(self, other: VarianceReport) -> None:
        """Add what `other` has seen.

        Raises:
            ValueError: it has another number of orders.
        """
        if other.num_orders != self.num_orders:
            raise ValueError(f"{other.num_orders} orders cannot join {self.num_orders}")
        if other.images:
            self._add(other.images, other.positions, other.sums)

    def reduce(self, accelerator: Accelerator) -> None:
        """Join the parts of all processes, in the order of their ranks; each then has the whole."""
        if accelerator.num_processes == 1:
            return
        device = accelerator.device
        channels = 0 if self.sums is None else self.sums.shape[1]
        own = torch.tensor([self.images, self.positions, channels], device=device)
        counts = accelerator.gather(own[None]).tolist()
        shape = (len(self.names) + len(self.pairs), max(row[2] for row in counts))
        # Processes without an image take part with zeros that nobody reads.
        mine = torch.zeros(shape, dtype=torch.float64, device=device)
        if self.sums is not None:
            mine = self.sums.to(device)
        gathered = accelerator.gather(mine[None])
        self.images, self.positions, self.sums = 0, 0, None
        for (images, positions, _), sums in zip(counts, gathered, strict=True):
            if images:
                self._add(images, positions, sums)

    def _add(self, images: int, positions: int, sums: Tensor) -> None:
        """Chan, Golub and LeVeque's update of means and centred products."""
        if self.sums is None:
            self.images, self.positions, self.sums = images, positions, sums.clone()
            return
        before, after, split = self.images, self.images + images, len(self.names)
        sums = sums.to(self.sums.device)
        shift = sums[:split] - self.sums[:split]
        at = {name: row for name, row in zip(self.names, shift, strict=True)}
        factor = before * images / after * self.positions
        cross = torch.stack([at[a] * at[b] for a, b in self.pairs]) * factor
        self.sums = torch.cat(
            [
                self.sums[:split] + shift * (images / after),
                self.sums[split:] + sums[split:] + cross,
            ]
        )
        self.images = after

    def _require_finite(self, sums: Tensor) -> None:
        """Raise `UserError` with the quantities that are not finite, and what may help."""
        split = len(self.names)
        finite = sums.isfinite().all(1)
        finite = finite[:split] & finite[split : 2 * split]
        bad = [name for name, good in zip(self.names, finite.tolist(), strict=True) if not good]
        orders = ", ".join(name for name in bad if name.startswith("order"))
        if "target" in bad:
            raise UserError(
                "the target, B's feature, is not finite (NaN or infinity) or too large; check B's "
                "weights, or choose another layer of B"
            )
        if orders:
            raise UserError(
                f"{orders} of the Trans-Net: not finite (NaN or infinity) or too large; its "
                "training diverged, then lower --lr; or constant channels of A, whose scale is "
                "1e-5, blow up, then choose another layer of A"
            )
        if not sums.isfinite().all():
            raise UserError(
                "the sum of the Trans-Net's orders is not finite (NaN or infinity) or too large: "
                "its training diverged; lower --lr"
            )

    def compute(self) -> dict[str, Any]:
        """The report, plain numbers.

        `orders` (list of Var(x^(n))), `residual`, `target`, `output` (Var(g)); `relative`, the same
        divided by `target`, NaN where that is 0; `covariances` of each two of the orders and the
        residual, by "order0,order1"; `per_channel` and `means`, a list of C numbers by name
        (order0, ..., residual, target, output); `constant_channels`, how many channels of the
        target never change; `images`, `positions`, `channels`, `mean_scope`.

        Raises:
            UserError: no image was added, or a feature is not finite.
        """
        if self.sums is None:
            raise UserError("no image to compute variances of; choose another split")
        values = self.sums.cpu()
        split = len(self.names)
        self._require_finite(values)
        means = dict(zip(self.names, values[:split], strict=True))
        products = values[split:] / (self.images * self.positions)
        moments = dict(zip(self.pairs, products, strict=True))
        scalars = {pair: own.mean().item() for pair, own in moments.items()}
        if self.mean_scope == "global":
            for a, b in moments:
                scalars[a, b] += (
                    ((means[a] - means[a].mean()) * (means[b] - means[b].mean())).mean().item()
                )
        variance = {name: scalars[name, name] for name in self.names}
        rounding = 1e-24 * means["target"].square()
        total = variance["target"]
        share = {name: own / total if total else math.nan for name, own in variance.items()}
        return {
            **_by_kind(variance),
            "relative": _by_kind(share),
            "covariances": {f"{a},{b}": v for (a, b), v in scalars.items() if a != b},
            "per_channel": {name: moments[name, name].tolist() for name in self.names},
            "means": {name: own.tolist() for name, own in means.items()},
            "constant_channels": int((moments["target", "target"] <= rounding).sum()),
            "images": self.images,
            "positions": self.positions,
            "channels": values.shape[1],
            "mean_scope": self.mean_scope,
        }


def _by_kind(values: dict[str, float]) -> dict[str, Any]:
    orders = [value for name, value in values.items() if name.startswith("order")]
    return {"orders": orders} | {n: v for n, v in values.items() if not n.startswith("order")}
