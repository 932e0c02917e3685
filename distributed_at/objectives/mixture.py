"""Adversarial images beside a share of their clean counterparts: mixing ratio, mixture BN and adversarial logit pairing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from distributed_at.lazy import F, torch
from distributed_at.objectives.base import BranchName, Forward, Needs, Objective, Passes, Terms, required_adv
from distributed_at.objectives.labels import SmoothedSection, cross_entropies

if TYPE_CHECKING:
    from distributed_at.batch import Batch


class Mixture(Objective):
    """alpha * L(clean) + (1 - alpha) * L(adv) (Xie & Yuille, "Intriguing properties", eq. 1 and section 4.1, figure 1).

    All adversarial images stay; of each BN group the share ``clean_ratio`` of clean counterparts is kept, chosen by
    counters. With one BN both kinds go through *one* forward, so that each group's statistics are those of the mixture
    (section 4.2, figure 4). With "mbn" clean images use the clean branch and adversarial ones the adv branch (section
    4.2, MBN); with "gn" the two forwards are independent anyway. ``weighting="samples"`` is the mean over all samples,
    the other reading of partial ratios, whose weight the paper leaves open. Where no clean image is kept
    the loss is that of the adversarial images. An epoch's last group may be smaller than the others and keep another share:
    then the equation holds for each group, and loss and running statistics are means over groups, weighted by their
    adversarial images, so that neither depends on how many groups a forward holds.

    ``logit_pairing`` adds ALP (Kannan et al. 2018, section 4; Xie & Yuille, table 1), gradient through both:
    "mse_mean" = mean of squared differences over batch and classes (the ALP code), "l2_sum" = sum over classes, mean
    over the batch.
    """

    class Config(SmoothedSection):
        """Adversarial plus a share of the clean counterparts, one BN, MBN or GN, with optional logit pairing (Xie & Yuille)."""

        name: Literal["mixture"] = "mixture"
        clean_ratio: float = Field(
            default=1.0,
            ge=0,
            le=1,
            description="share of the batch whose clean counterpart is kept, chosen by counters",
        )
        weighting: Literal["alpha", "samples"] = Field(
            default="alpha",
            description="'alpha' = alpha * mean(clean) + (1 - alpha) * mean(adv); 'samples' = mean over all samples",
        )
        alpha: float = Field(default=0.5, ge=0, le=1)
        logit_pairing: float = Field(default=0.0, ge=0, description="weight of adversarial logit pairing")
        logit_pairing_form: Literal["mse_mean", "l2_sum"] = "mse_mean"

        @model_validator(mode="after")
        def _pairs(self) -> Mixture.Config:
            if self.logit_pairing > 0 and self.clean_ratio < 1:
                raise ValueError(
                    f"logit_pairing pairs every adversarial image with its clean one: clean_ratio must be 1, got {self.clean_ratio:g}"
                )
            return self

    config: Config
    title = "adversarial + clean mixture"
    source = "Xie & Yuille, Intriguing properties of adversarial training at scale, ICLR 2020"

    @classmethod
    def trains(cls, config: Config) -> tuple[BranchName, ...]:
        return cls.branches if config.clean_ratio > 0 else ("adv",)

    @classmethod
    def needs(cls, config: Config) -> Needs:
        if config.clean_ratio == 1:
            return Needs()
        return Needs(
            whole_groups=f"objective.clean_ratio {config.clean_ratio:g} chooses its clean images inside a BN group"
        )

    @classmethod
    def passes(cls, config: Config) -> Passes:
        return Passes(trained={"clean": config.clean_ratio, "adv": 1.0}, moving=cls.trains(config))

    @classmethod
    def clean_share(cls, config: Config) -> float | None:
        return config.clean_ratio

    @classmethod
    def notes(cls, config: Config, group_size: int) -> tuple[str, ...]:
        kept = kept_count(group_size, config.clean_ratio)
        if kept == config.clean_ratio * group_size:
            return ()
        return (
            f"of each group of {group_size} images {kept} clean ones are kept: a share of {kept / group_size:.2%} for "
            f"objective.clean_ratio {config.clean_ratio:g}, as in Xie & Yuille's code",
        )

    @classmethod
    def extras(cls, config: Config) -> tuple[str, ...]:
        return ("ALP",) if config.logit_pairing > 0 else ()

    def bn_group_sizes(self, group_size: int) -> dict[BranchName, int]:
        """Return BN's samples a branch: with one BN the group of the mixture, with "mbn" each branch's own."""
        kept = kept_count(group_size, self.config.clean_ratio)
        if self.context.shared_statistics:
            return {"clean": group_size + kept, "adv": group_size + kept}
        return {"clean": max(kept, 1), "adv": group_size}

    def loss(self, forward: Forward, batch: Batch, adv: torch.Tensor | None) -> Terms:
        """Return the mixture's loss over the micro-batch, which must hold whole BN groups where clean_ratio < 1."""
        c = self.config
        adv = required_adv(adv, batch)
        rows = self.clean_rows(batch)
        groups = self._groups(batch, rows)
        clean_logits, adv_logits = self._logits(forward, batch, adv, rows, groups)
        origin = batch.origin
        adv_losses = cross_entropies(adv_logits, batch.labels, origin, c)
        clean_losses = cross_entropies(clean_logits, batch.labels[rows], None if origin is None else origin[rows], c)
        terms = {"adv_loss": adv_losses.mean().detach()}
        parts = zip(clean_losses.split([k for _, k in groups]), adv_losses.split([n for n, _ in groups]), strict=True)
        means = [mixed_mean(*part, c.alpha, weighting=c.weighting) * (len(part[1]) / len(batch)) for part in parts]
        loss = torch.stack(means).sum()
        if len(rows) == 0:
            return Terms(loss, terms, {"adv": adv_logits.detach()}, rows)
        terms["clean_loss"] = clean_losses.mean().detach()
        if c.logit_pairing > 0:
            pairing = pairing_loss(clean_logits, adv_logits[rows], c.logit_pairing_form)
            loss = loss + c.logit_pairing * pairing
            terms["logit_pairing"] = pairing.detach()
        logits = {"clean": clean_logits.detach(), "adv": adv_logits.detach()}
        whole = len(rows) == len(batch)
        return Terms(loss, terms, logits, None if whole else rows, {} if whole else {"clean_loss": len(rows)})

    def _groups(self, batch: Batch, rows: torch.Tensor) -> list[tuple[int, int]]:
        """Return (adversarial, clean) images of each group where groups differ; where they do not, of all at once."""
        if self.config.clean_ratio < 1:
            sizes = torch.unique_consecutive(batch.group_ids, return_counts=True)[1].tolist()
            if len(set(sizes)) > 1:
                return [(size, kept_count(size, self.config.clean_ratio)) for size in sizes]
        return [(len(batch), len(rows))]

    def _shares(self, groups: list[tuple[int, int]]) -> tuple[float, ...] | None:
        """Return by what share each group with clean images moves the running statistics; None = by its samples."""
        total = sum(n for n, _ in groups)
        every = self.context.shared_statistics
        return tuple(n / total for n, kept in groups if kept or every) if len(groups) > 1 else None

    def _logits(
        self, forward: Forward, batch: Batch, adv: torch.Tensor, rows: torch.Tensor, groups: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits of the kept clean images (M, K) and of all adversarial ones (N, K)."""
        if len(rows) == 0:
            adv_logits = forward(adv, branch="adv")
            return adv_logits[:0], adv_logits
        clean = batch.images if len(rows) == len(batch) else batch.images[rows]
        shares = self._shares(groups)
        if not self.context.shared_statistics:
            return forward(clean, branch="clean", shares=shares, ids=batch.ids[rows]), forward(adv, branch="adv")
        # one forward; each BN group's clean and adversarial images lie together, so a chunk of BN is one mixed group
        places = torch.cat([batch.group_ids[rows], batch.group_ids])
        order = torch.argsort(places, stable=True)
        ids = torch.cat([batch.ids[rows], batch.ids])[order]
        mixed = forward(torch.cat([clean, adv])[order], branch="adv", shares=shares, ids=ids)
        logits = torch.empty_like(mixed).index_copy(0, order, mixed)
        return logits[: len(rows)], logits[len(rows) :]

    def clean_rows(self, batch: Batch) -> torch.Tensor:
        """Return the rows, rising, of the clean images that are kept: of every BN group the ones of smallest draw.

        A function of seed, epoch and the group's sample ids alone, so the same at every world size.
        """
        if self.config.clean_ratio >= 1:
            return torch.arange(len(batch), device=batch.ids.device)
        from distributed_at import rng

        draw = rng.words(self.context.seed, rng.Purpose.CLEAN_SUBSET, batch.epoch, batch.ids, 1)[:, 0]
        same = batch.group_ids[:, None] == batch.group_ids[None, :]  # (N, N)
        earlier = (draw[None, :] < draw[:, None]) | (
            (draw[None, :] == draw[:, None]) & (batch.ids[None, :] < batch.ids[:, None])
        )
        place = (same & earlier).sum(dim=1)
        kept = (same.sum(dim=1).to(torch.float64) * self.config.clean_ratio + 0.5).floor()
        return torch.nonzero(place < kept)[:, 0]


def mixture_loss(
    clean_logits: torch.Tensor,
    adv_logits: torch.Tensor,
    clean_labels: torch.Tensor,
    labels: torch.Tensor,
    alpha: float = 0.5,
    *,
    weighting: Literal["alpha", "samples"] = "alpha",
) -> torch.Tensor:
    """Return the scalar loss of logits of the kept clean images (M, K) and the adversarial ones (N, K)."""
    clean_losses = F.cross_entropy(clean_logits, clean_labels, reduction="none")
    adv_losses = F.cross_entropy(adv_logits, labels, reduction="none")
    return mixed_mean(clean_losses, adv_losses, alpha, weighting=weighting)


def mixed_mean(
    clean_losses: torch.Tensor, adv_losses: torch.Tensor, alpha: float, *, weighting: Literal["alpha", "samples"]
) -> torch.Tensor:
    """Return the scalar mean of losses (M,) and (N,) by one of ``Mixture``'s weightings; that of (N,) where M is 0."""
    if len(clean_losses) == 0:
        return adv_losses.mean()
    if weighting == "alpha":
        return alpha * clean_losses.mean() + (1.0 - alpha) * adv_losses.mean()
    return (clean_losses.sum() + adv_losses.sum()) / (len(clean_losses) + len(adv_losses))


def kept_count(group_size: int, clean_ratio: float) -> int:
    """Return how many clean images of a group are kept: the nearest whole number, halves up."""
    return int(group_size * clean_ratio + 0.5)


def pairing_loss(
    clean_logits: torch.Tensor, adv_logits: torch.Tensor, form: Literal["mse_mean", "l2_sum"]
) -> torch.Tensor:
    """Return the scalar distance of paired logits (M, K); see ``Mixture`` for the forms."""
    squared = (clean_logits - adv_logits).square()
    return squared.mean() if form == "mse_mean" else squared.sum(dim=1).mean()
