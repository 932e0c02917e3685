"""Free adversarial training: what is shown, what the perturbation becomes, and that it keeps its place."""

from __future__ import annotations

import importlib
from dataclasses import replace

import torch
import torch.nn.functional as F

from distributed_at.config import AttackConfig
from distributed_at.objectives.free_at import FreeAt
from tests.conformance.kit import Recorder, agrees, batch_of
from tests.conformance.product import Mutation, Product

SETTINGS: list[dict] = [{"replays": 2}, {"replays": 3, "box": "images", "gradient": "own_pass"}]
# What a recipe says beside them, where its attack is another one's.
WORDS = ["attack.num_steps=1", "attack.start=zero", "attack.bn_mode=train"]
EPS, STEP = 8 / 255, 6 / 255


def objective(product: Product, **fields: object) -> FreeAt:
    """Return one for batches of 12 images in float64, with a radius of 8 and steps of 6 grey levels."""
    attack = AttackConfig(eps=8, num_steps=1, step_size=6, start="zero", bn_mode="train")
    batch, _ = batch_of()
    context = product.objectives.ObjectiveContext(
        num_classes=5, seed=0, places=len(batch), image_size=batch.images.shape[-1], attack=attack, eps=lambda step: EPS
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return product.objectives.build_objective(FreeAt.Config(**fields), context)
    finally:
        torch.set_default_dtype(default)


def one_backward_gives_both_gradients_at_the_delta_that_was_shown(product: Product) -> None:
    free, (batch, _) = objective(product), batch_of()
    delta = free.place_tensors()["delta"]
    delta.copy_(
        torch.rand(delta.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 * EPS - EPS
    )
    before, recorder = delta.clone(), Recorder()
    weights = list(recorder.model.parameters())
    terms = free.loss(recorder, batch, None)
    (call,) = recorder.calls
    assert (call["branch"], call["bn"]) == ("adv", "train"), "not one training forward a replay"
    assert agrees(call["x"].detach(), batch.images + before)
    assert agrees(terms.loss, F.cross_entropy(recorder.model(batch.images + before), batch.labels))
    terms.loss.backward()
    own = [weight.grad.clone() for weight in weights if weight.grad is not None]
    free.before_step(recorder.model, batch, last=True)
    after = [weight.grad for weight in weights if weight.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(own, after, strict=True)), (
        "the weights' gradient is not that of one backward"
    )
    leaf = before.clone().requires_grad_()
    F.cross_entropy(recorder.model(batch.images + leaf), batch.labels).backward()
    moved = torch.clamp(before + STEP * torch.sign(leaf.grad), min=-EPS, max=EPS)
    moved = torch.max(torch.min(moved, 1 - batch.images), -batch.images)
    assert agrees(delta, moved), "delta does not climb by a step of the sign, into the ball and the box"


def delta_stays_between_batches_and_a_smaller_one_uses_the_first_places(product: Product) -> None:
    free, (batch, _) = objective(product), batch_of()
    recorder = Recorder()

    def take(of) -> torch.Tensor:
        recorder.calls.clear()
        free.loss(recorder, of, None).loss.backward()
        free.before_step(recorder.model, of, last=True)
        return recorder.calls[0]["x"].detach() - of.images

    first = take(batch)
    kept = free.place_tensors()["delta"].clone()
    assert not first.any(), "delta does not begin at zero"
    assert kept.any(), "delta does not move"
    other = replace(batch, images=batch.images.flip(0), epoch=9, step=8)
    assert torch.allclose(take(other), kept, atol=1e-12), "another batch, or epoch, does not find what was left"
    whole = free.place_tensors()["delta"].clone()
    few = replace(
        batch, ids=batch.ids[:5], images=batch.images[:5], labels=batch.labels[:5], group_ids=batch.group_ids[:5]
    )
    assert torch.allclose(take(few), whole[:5], atol=1e-12), "a smaller batch does not use the first places"
    assert torch.equal(free.place_tensors()["delta"][5:], whole[5:]), "places without an image move"
    second = replace(few, place=5)
    assert torch.allclose(take(second), whole[5:10], atol=1e-12), "a micro-batch does not begin at its place"
    before = free.place_tensors()["delta"].clone()
    assert not take(replace(few, place=None)).any()
    assert torch.equal(free.place_tensors()["delta"], before), "a stand-in leaves a trace"


def box_of_the_images_cuts_the_sum_and_gives_no_gradient_there(product: Product) -> None:
    free = objective(product, box="images")
    batch, _ = batch_of()
    batch = replace(batch, images=batch.images.round())  # of zeros and ones
    delta = free.place_tensors()["delta"]
    delta.fill_(EPS / 2)
    recorder = Recorder()
    free.loss(recorder, batch, None).loss.backward()
    shown = recorder.calls[0]["x"].detach()
    assert shown.max() <= 1
    free.before_step(recorder.model, batch, last=True)
    cut = batch.images == 1  # and eps / 2 more
    assert torch.equal(delta[cut], torch.full_like(delta[cut], EPS / 2)), "a pixel that is cut moves"
    assert (delta[~cut] != EPS / 2).any()
    delta.zero_()
    free.loss(recorder, batch, None).loss.backward()
    free.before_step(recorder.model, batch, last=True)
    assert (delta[cut] != 0).float().mean() > 0.9, "a pixel at the edge of the box, which is not cut, has no gradient"


def gradient_that_is_not_finite_moves_nothing(product: Product) -> None:
    rules = importlib.import_module(f"{product.objectives.__name__}.free_at")
    delta, images = torch.full((1, 1, 1, 2), 0.01), torch.full((1, 1, 1, 2), 0.5)
    moved = rules.free_update(delta, torch.tensor([[[[float("nan"), -2.0]]]]), images, eps=0.03)
    assert torch.allclose(moved, torch.tensor([[[[0.01, -0.02]]]]))
    assert torch.equal(rules.free_images(images, torch.full_like(images, 0.7), box="images"), torch.ones_like(images))


CHECKS = [
    one_backward_gives_both_gradients_at_the_delta_that_was_shown,
    delta_stays_between_batches_and_a_smaller_one_uses_the_first_places,
    box_of_the_images_cuts_the_sum_and_gives_no_gradient_there,
    gradient_that_is_not_finite_moves_nothing,
]

FILE = "objectives/free_at.py"
MUTATIONS = [
    Mutation(
        "the whole eps where the recipe gives a step", FILE, "            step_size=attack.step_size / 255.0,\n",
        "", "one_backward_gives_both_gradients_at_the_delta_that_was_shown",
    ),
    Mutation(
        "delta descends", FILE, "moved = delta + (eps", "moved = delta - (eps",
        "one_backward_gives_both_gradients_at_the_delta_that_was_shown",
    ),
    Mutation(
        "delta may leave the box", FILE, 'return moved if box == "images" else', "return moved if True else",
        "one_backward_gives_both_gradients_at_the_delta_that_was_shown",
    ),
    Mutation(
        "delta is shown before it is projected into the ball", FILE, "    moved = moved.clamp(-eps, eps)\n", "",
        "one_backward_gives_both_gradients_at_the_delta_that_was_shown",
    ),
    Mutation(
        "delta is forgotten after each step", FILE, "self._rows(batch).copy_(moved)", "self._rows(batch).zero_()",
        "delta_stays_between_batches_and_a_smaller_one_uses_the_first_places",
    ),
    Mutation(
        "every micro-batch uses the first places", FILE, "self._delta[batch.place : batch.place + len(batch)]",
        "self._delta[: len(batch)]", "delta_stays_between_batches_and_a_smaller_one_uses_the_first_places",
    ),
    Mutation(
        "a stand-in moves the first places", FILE, "        if batch.place is None:\n            return\n",
        "        batch = batch if batch.place is not None else __import__('dataclasses').replace(batch, place=0)\n",
        "delta_stays_between_batches_and_a_smaller_one_uses_the_first_places",
    ),
    Mutation(
        "pixels beyond the box have a gradient", FILE, "total, total.detach().clamp(0.0, 1.0))",
        "total, total - total.detach() + total.detach().clamp(0.0, 1.0))",
        "box_of_the_images_cuts_the_sum_and_gives_no_gradient_there",
    ),
    Mutation(
        "pixels at the edge of the box have no gradient", FILE, "(total >= 0.0) & (total <= 1.0)", "(total > 0.0) & (total < 1.0)",
        "box_of_the_images_cuts_the_sum_and_gives_no_gradient_there",
    ),
    Mutation(
        "a NaN in one gradient stays for ever", FILE, "* gradient.sign()", "* gradient / gradient.abs()",
        "gradient_that_is_not_finite_moves_nothing",
    ),
]  # fmt: skip
