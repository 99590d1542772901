"""Accuracy over a whole split, every image once, on however many processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from kdfast.data import Loader


def evaluate(
    network: Callable[[torch.Tensor], torch.Tensor],
    loader: Loader,
    accelerator: Accelerator,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    before_batch: Callable[[], None] = lambda: None,
    parts: Mapping[str, range] = MappingProxyType({}),
) -> dict[str, float | None]:
    """Mean cross-entropy `loss`, `top1` and `top5` in percent (top-C below five classes), `images`.

    `network` maps prepared images [B, 3, H, W] to logits [B, C]; sums stay on the device until the
    end and are added over processes. All processes call `before_batch` equally often. `parts` are
    ranges of dataset indices; each adds a `top1_<part>`, None where no image of it was read.
    """
    (scores,) = evaluate_all(
        lambda x: [network(x)], 1, loader, accelerator, prepare, before_batch, parts
    )
    return scores


@torch.no_grad()
def evaluate_all(
    network: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    classifiers: int,
    loader: Loader,
    accelerator: Accelerator,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    before_batch: Callable[[], None] = lambda: None,
    parts: Mapping[str, range] = MappingProxyType({}),
) -> list[dict[str, float | None]]:
    """`evaluate` of a network that answers with the logits [B, C] of so many classifiers."""
    device = accelerator.device
    sums = torch.zeros(classifiers, 4 + 2 * len(parts), dtype=torch.float64, device=device)
    for batch in loader.epoch(0):
        before_batch()
        if not batch.portion.count:
            continue
        labels, indices = (
            tensor.to(device, non_blocking=True) for tensor in (batch.labels, batch.indices)
        )
        inside = [(indices >= part.start) & (indices < part.stop) for part in parts.values()]
        with accelerator.autocast():
            answers = network(prepare(batch.images))
        sums += torch.stack([_sums(logits.float(), labels, inside) for logits in answers])
    return [
        {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}
        | {"images": int(count)}
        | {
            f"top1_{name}": 100 * right / images if images else None
            for name, right, images in zip(parts, apart[::2], apart[1::2], strict=True)
        }
        for loss, top1, top5, count, *apart in accelerator.reduce(sums, "sum").tolist()
    ]


def hits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B, min(5, C)] booleans: whether the label is the class of that rank by its logit."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]


def _sums(
    logits: torch.Tensor, labels: torch.Tensor, inside: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Of a batch: losses, correct ones, those among the first five, images; float64.

    Then, for each of the masks [B] in `inside`, correct ones and images.
    """
    ranked = hits(logits, labels)
    loss = F.cross_entropy(logits, labels, reduction="none")
    return torch.stack(
        [
            loss.sum(dtype=torch.float64),
            ranked[:, 0].sum(),
            ranked.sum(),
            torch.full((), len(labels), device=labels.device),
            *(count for mask in inside for count in ((mask & ranked[:, 0]).sum(), mask.sum())),
        ]
    )
