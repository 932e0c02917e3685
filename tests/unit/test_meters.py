"""What a log row says of the steps since the last one, over all ranks."""

from __future__ import annotations

import torch

from distributed_at.engine.progress import Meters
from distributed_at.objectives import Terms


def terms(loss: float, hits: int, of: int) -> tuple[Terms, torch.Tensor]:
    labels = torch.zeros(of, dtype=torch.int64)
    logits = torch.nn.functional.one_hot((torch.arange(of) >= hits).long(), 2).float()
    return Terms(torch.tensor(loss), {"adv_loss": torch.tensor(loss)}, {"adv": logits}), labels


def collected(meters: list[Meters]) -> list[dict[str, float]]:
    """Let each collect as a rank of one world: a collective takes equal shapes alone."""
    names = [sorted(m.state()["sums"]) for m in meters]
    asked: list[torch.Tensor] = []
    for m in meters:  # a first round, on copies, to learn what each would reduce
        twin = Meters(torch.device("cpu"))
        twin.load([m.state()], 0, 1)
        twin.collect(lambda sums: asked.append(sums.clone()) or sums, lambda own: names)
    assert len({tuple(sums.shape) for sums in asked}) == 1, "ranks would reduce tensors of different shapes"
    total = torch.stack(asked).sum(dim=0)
    return [m.collect(lambda sums: total, lambda own: names)[0] for m in meters]


def test_row_is_the_mean_over_the_samples_of_all_ranks():
    ranks = [Meters(torch.device("cpu")) for _ in range(2)]
    ranks[0].add(*terms(1.0, hits=3, of=4))
    ranks[0].add(*terms(2.0, hits=0, of=2))
    ranks[1].add(*terms(4.0, hits=2, of=2))
    first, second = collected(ranks)
    assert first == second == {"loss": 2.0, "adv_loss": 2.0, "adv_accuracy": 5 / 8}


def test_a_rank_without_samples_reduces_the_same_sums():
    ranks = [Meters(torch.device("cpu")) for _ in range(2)]
    ranks[0].add(*terms(1.5, hits=1, of=4))
    first, second = collected(ranks)
    assert first == second == {"loss": 1.5, "adv_loss": 1.5, "adv_accuracy": 0.25}


def test_a_row_counts_only_what_came_after_the_last_one():
    meters = Meters(torch.device("cpu"))
    meters.add(*terms(8.0, hits=1, of=1))
    collected([meters])
    meters.add(*terms(1.0, hits=0, of=2))
    assert collected([meters])[0]["loss"] == 1.0
    assert collected([meters])[0] == {}
