"""From sample ids to rows: read, predict, attack, judge. Which ids, where and how often is ``runner.py``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from distributed_at.errors import DataError
from distributed_at.evaluation.attacked import AttackedSamples
from distributed_at.evaluation.isolation import Model
from distributed_at.evaluation.kinds import KINDS
from distributed_at.evaluation.protocol import Protocol
from distributed_at.evaluation.rows import CLEAN, SURVIVED, Rows
from distributed_at.evaluation.source import Source
from distributed_at.logits import NO_CLASS, check_labels, checked_logits, predicted_classes

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_forward(
    model: Model, protocol: Protocol, device: torch.device, beat: Callable[[], None] = lambda: None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return x (N, C, H, W) in [0, 1] -> logits (N, K) float32, in the protocol's dtype.

    ``beat`` is called before each pass.
    """
    low = _AUTOCAST.get(protocol.dtype)

    def forward(x: torch.Tensor) -> torch.Tensor:
        beat()
        if low is None:
            return checked_logits(model(x), x, protocol.num_classes).float()
        with torch.autocast(device.type, dtype=low):
            return checked_logits(model(x), x, protocol.num_classes).float()

    return forward


class RowMaker:
    """The model with everything that turns sample ids into rows."""

    def __init__(
        self,
        model: Model,
        source: Source,
        protocol: Protocol,
        device: torch.device,
        batch_size: int,
        counts: tuple[int, ...] = (),
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """``counts``: fewer numbers of PGD steps whose rows ``rows`` makes as well; ``beat``: as in ``make_forward``."""
        self.source, self.protocol, self.counts = source, protocol, counts
        self.device, self.batch_size = device, batch_size
        self.forward = make_forward(model, protocol, device, beat)

    def rows(self, ids: np.ndarray) -> tuple[Rows, dict[int, Rows]]:
        """Return the rows of a piece of work, ids (N,), and number of steps -> rows for each of ``counts``."""
        protocol = self.protocol
        images, labels = self.source.read(ids, epoch=0, train=False, seed=0)
        x = images.to(self.device).float().div_(255)  # (N, C, H, W), [0, 1]
        y = labels.to(self.device)
        check_labels(y, protocol.num_classes or int(y.max()) + 1)
        with torch.no_grad():
            logits = torch.cat([self.forward(part) for part in x.split(self.batch_size)])
            loss = F.cross_entropy(logits, y, reduction="none").double()
        clean = predicted_classes(logits)
        broken = ids[(clean == NO_CLASS).cpu().numpy()]
        if len(broken):
            raise DataError(
                f"the network's logits of {len(broken)} clean images are not finite (sample ids "
                f"{', '.join(map(str, broken[:8].tolist()))}{' …' if len(broken) > 8 else ''}): nothing measured of it "
                "would mean anything"
            )
        correct_clean = clean == y
        chosen = torch.arange(len(y), device=self.device)
        if protocol.scope == "clean_correct":
            chosen = chosen[correct_clean]
        on_the_way = {count: AttackedSamples.unbroken(y[chosen]) for count in self.counts}
        outcome = KINDS[protocol.kind].attack(
            self.forward,
            x[chosen],
            y[chosen],
            ids=torch.from_numpy(ids).to(self.device)[chosen],
            piece=ids,
            protocol=protocol,
            on_the_way=on_the_way,
        )

        def rows_of(outcome: AttackedSamples | None) -> Rows:
            return self._judged(ids, y, clean, correct_clean, loss, chosen, outcome)

        return rows_of(outcome), {count: rows_of(fewer) for count, fewer in on_the_way.items()}

    def _judged(
        self,
        ids: np.ndarray,
        y: torch.Tensor,
        clean: torch.Tensor,
        correct_clean: torch.Tensor,
        clean_loss: torch.Tensor,
        chosen: torch.Tensor,
        outcome: AttackedSamples | None,
    ) -> Rows:
        """Return the rows of one outcome over the samples at ``chosen``; None = no attack."""
        protocol = self.protocol
        prediction, correct, loss = clean.clone(), correct_clean.clone(), clean_loss.clone()
        hit = torch.zeros_like(correct)
        broken_by = np.where(correct_clean.cpu().numpy(), SURVIVED, CLEAN).astype(object)
        if outcome is not None:
            prediction[chosen], loss[chosen], hit[chosen] = outcome.prediction, outcome.loss, outcome.target_hit
            correct[chosen] = ~outcome.broken
            names = np.array([*protocol.attacks, SURVIVED], dtype=object)[outcome.attack.cpu().numpy()]
            still_clean = chosen.cpu().numpy()
            broken_by[still_clean] = names
            # what was wrong before the attack and stays wrong was not broken by it
            broken_by[(~correct_clean & ~correct).cpu().numpy()] = CLEAN
        return Rows(
            sample_id=ids,
            label=y.cpu().numpy(),
            clean_prediction=clean.cpu().numpy(),
            adv_prediction=prediction.cpu().numpy(),
            correct_clean=correct_clean.cpu().numpy(),
            correct_adv=correct.cpu().numpy(),
            loss=loss.cpu().numpy(),
            target_hit=hit.cpu().numpy(),
            attack=broken_by.astype(np.str_),
        )
