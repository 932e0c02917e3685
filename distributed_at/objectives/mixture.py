"""Adversarial images beside a share of their clean counterparts: mixing ratio, mixture BN and adversarial logit pairing."""

from __future__ import annotations

from typing import Literal

import torch

from distributed_at import rng
from distributed_at.attacks.labels import SmoothingForm, smoothed_cross_entropy
from distributed_at.batch import Batch
from distributed_at.config import MixtureConfig, Norm
from distributed_at.objectives.base import BranchName, Forward, Objective, Terms, required_adv


class Mixture(Objective):
    """alpha * L(clean) + (1 - alpha) * L(adv) (Xie & Yuille, "Intriguing properties", eq. 1 and section 4.1, figure 1).

    All adversarial images stay; of each BN group the share ``clean_ratio`` of clean counterparts is kept, chosen by
    counters. With one BN both kinds go through *one* forward, so that each group's statistics are those of the mixture
    (section 4.2, figure 4). With "mbn" clean images use the clean branch and adversarial ones the adv branch (section
    4.2, MBN); with "gn" the two forwards are independent anyway. ``weighting="samples"`` is the mean over all samples,
    the other reading of partial ratios, whose weight the paper leaves open. Where no clean image is kept
    the loss is that of the adversarial images.

    ``logit_pairing`` adds ALP (Kannan et al. 2018, section 4; Xie & Yuille, table 1), gradient through both:
    "mse_mean" = mean of squared differences over batch and classes (the ALP code), "l2_sum" = sum over classes, mean
    over the batch.
    """

    def __init__(
        self,
        *,
        seed: int,
        norm: Norm = "bn",
        clean_ratio: float = 1.0,
        weighting: Literal["alpha", "samples"] = "alpha",
        alpha: float = 0.5,
        logit_pairing: float = 0.0,
        logit_pairing_form: Literal["mse_mean", "l2_sum"] = "mse_mean",
        label_smoothing: float = 0.0,
        label_smoothing_form: SmoothingForm = "uniform",
        attack_branch: BranchName = "adv",
    ) -> None:
        self.seed, self.norm = seed, norm
        self.clean_ratio, self.weighting, self.alpha = clean_ratio, weighting, alpha
        self.logit_pairing, self.logit_pairing_form = logit_pairing, logit_pairing_form
        self.label_smoothing, self.label_smoothing_form = label_smoothing, label_smoothing_form
        self.attack_branch = attack_branch

    @classmethod
    def from_config(
        cls, config: MixtureConfig, *, seed: int, norm: Norm = "bn", attack_branch: BranchName = "adv"
    ) -> Mixture:
        return cls(
            seed=seed,
            norm=norm,
            clean_ratio=config.clean_ratio,
            weighting=config.weighting,
            alpha=config.alpha,
            logit_pairing=config.logit_pairing,
            logit_pairing_form=config.logit_pairing_form,
            label_smoothing=config.label_smoothing,
            label_smoothing_form=config.label_smoothing_form,
            attack_branch=attack_branch,
        )

    def bn_group_sizes(self, group_size: int) -> dict[BranchName, int]:
        """Return BN's samples a branch: with one BN the group of the mixture, with "mbn" each branch's own."""
        kept = kept_count(group_size, self.clean_ratio)
        if self.norm == "bn":
            return {"clean": group_size + kept, "adv": group_size + kept}
        return {"clean": max(kept, 1), "adv": group_size}

    def loss(self, forward: Forward, batch: Batch, adv: torch.Tensor | None) -> Terms:
        """Return the mixture's loss over the micro-batch, which must hold whole BN groups where clean_ratio < 1."""
        adv = required_adv(adv, batch)
        rows = self.clean_rows(batch)
        clean_logits, adv_logits = self._logits(forward, batch, adv, rows)
        adv_losses = self._cross_entropy(adv_logits, batch.labels)
        clean_losses = self._cross_entropy(clean_logits, batch.labels[rows])
        adv_loss = adv_losses.mean()
        terms = {"adv_loss": adv_loss.detach()}
        if len(rows) == 0:
            return Terms(adv_loss, terms, {"adv": adv_logits.detach()}, rows)
        clean_loss = clean_losses.mean()
        if self.weighting == "alpha":
            loss = self.alpha * clean_loss + (1.0 - self.alpha) * adv_loss
        else:
            loss = (clean_losses.sum() + adv_losses.sum()) / (len(clean_losses) + len(adv_losses))
        terms["clean_loss"] = clean_loss.detach()
        if self.logit_pairing > 0:
            pairing = pairing_loss(clean_logits, adv_logits[rows], self.logit_pairing_form)
            loss = loss + self.logit_pairing * pairing
            terms["logit_pairing"] = pairing.detach()
        logits = {"clean": clean_logits.detach(), "adv": adv_logits.detach()}
        return Terms(loss, terms, logits, None if len(rows) == len(batch) else rows)

    def _logits(
        self, forward: Forward, batch: Batch, adv: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits of the kept clean images (M, K) and of all adversarial ones (N, K)."""
        if len(rows) == 0:
            adv_logits = forward(adv, branch="adv")
            return adv_logits[:0], adv_logits
        clean = batch.images if len(rows) == len(batch) else batch.images[rows]
        if self.norm != "bn":
            return forward(clean, branch="clean"), forward(adv, branch="adv")
        # one forward; each BN group's clean and adversarial images lie together, so a chunk of BN is one mixed group
        groups = torch.cat([batch.group_ids[rows], batch.group_ids])
        order = torch.argsort(groups, stable=True)
        mixed = forward(torch.cat([clean, adv])[order], branch="adv")
        logits = torch.empty_like(mixed).index_copy(0, order, mixed)
        return logits[: len(rows)], logits[len(rows) :]

    def clean_rows(self, batch: Batch) -> torch.Tensor:
        """Return the rows, rising, of the clean images that are kept: of every BN group the ones of smallest draw.

        A function of seed, epoch and the group's sample ids alone, so the same at every world size.
        """
        if self.clean_ratio >= 1:
            return torch.arange(len(batch), device=batch.ids.device)
        draw = rng.words(self.seed, rng.Purpose.CLEAN_SUBSET, batch.epoch, batch.ids, 1)[:, 0]
        same = batch.group_ids[:, None] == batch.group_ids[None, :]  # (N, N)
        earlier = (draw[None, :] < draw[:, None]) | (
            (draw[None, :] == draw[:, None]) & (batch.ids[None, :] < batch.ids[:, None])
        )
        place = (same & earlier).sum(dim=1)
        kept = (same.sum(dim=1).to(torch.float64) * self.clean_ratio + 0.5).floor()
        return torch.nonzero(place < kept)[:, 0]

    def _cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return smoothed_cross_entropy(logits, labels, self.label_smoothing, form=self.label_smoothing_form)


def kept_count(group_size: int, clean_ratio: float) -> int:
    """Return how many clean images of a group are kept: the nearest whole number, halves up."""
    return int(group_size * clean_ratio + 0.5)


def pairing_loss(
    clean_logits: torch.Tensor, adv_logits: torch.Tensor, form: Literal["mse_mean", "l2_sum"]
) -> torch.Tensor:
    """Return the scalar distance of paired logits (M, K); see ``Mixture`` for the forms."""
    squared = (clean_logits - adv_logits).square()
    return squared.mean() if form == "mse_mean" else squared.sum(dim=1).mean()
