"""Bugs planted in a copy of the attacks: those seen in other implementations, and their kin."""

from tests.conformance.product import Mutation

PGD, BALLS, THREAT = "attacks/pgd.py", "attacks/balls.py", "attacks/threat.py"
ITERATION, LOSSES, TARGETS = "attacks/iteration.py", "attacks/losses.py", "attacks/targets.py"

_L2_STEP = (
    "    return reference.l2_step(adv, bounds.center, grad, bounds.eps, step_size, -1.0, bounds.lower, bounds.upper)\n"
)
_GRADIENT = "        (grad,) = torch.autograd.grad(total, image)\n"
_STEP = "            adv, logits = iterate(adv, step_size, bounds, goal)\n"
_CHOICE = "            self.target, y, classes or 0, seed=seed, epoch=epoch, sample_ids=sample_ids, logits=clean\n"
_UNIT = "            unit = rng.uniform(seed, rng.Purpose.START, epoch, sample_ids, count, draw=draw).to(x.dtype)\n"

MUTATIONS = [
    Mutation(
        ".backward() in the attack", ITERATION, _GRADIENT,
        "        total.backward()\n        grad = image.grad\n", "weights_gradients_are_untouched",
    ),
    Mutation(
        "weights' gradients cleared after the attack", ITERATION, _GRADIENT,
        _GRADIENT + "        for p in getattr(model, 'parameters', list)():\n            p.grad = None\n",
        "weights_gradients_are_untouched",
    ),
    Mutation(
        "graph kept in the result", PGD,
        "        with torch.inference_mode(False), torch.no_grad(), evaluation_mode(model):\n",
        "        x = x.clone().requires_grad_()\n        with torch.enable_grad(), evaluation_mode(model):\n",
        "result_is_detached_and_input_kept",
    ),
    Mutation(
        "mean loss underflows", ITERATION,
        "        total = loss(at_least_float32(logits), goal).sum() * loss_scale\n        (grad,)",
        "        total = loss(at_least_float32(logits), goal).mean() * loss_scale\n        (grad,)",
        "sum_and_mean_do_not_matter",
    ),
    Mutation(
        "value read on the host in every iteration", ITERATION,
        "        (grad,) = torch.autograd.grad(total, image)\n",
        "        (grad,) = torch.autograd.grad(total, image)\n        total.item()\n", "loop_waits_for_nothing",
    ),
    Mutation(
        "model left in train mode during the attack", PGD, "torch.no_grad(), evaluation_mode(model):",
        "torch.no_grad():", "training_state_is_untouched",
    ),
    Mutation(
        "model left in eval mode after the attack", "attacks/modes.py",
        "                object.__setattr__(module, name, value)\n", "                pass\n",
        "training_state_is_untouched",
    ),
    Mutation(
        "whole model put back to train mode", "attacks/modes.py",
        "        for module, values in flags:\n            for name, value in values.items():\n"
        "                object.__setattr__(module, name, value)\n",
        "        model.train()\n", "training_state_is_untouched",
    ),
    Mutation(
        "global generator used for the start", THREAT, _UNIT,
        "            unit = torch.rand((n, count), dtype=x.dtype)\n", "global_generators_are_untouched",
    ),
    Mutation(
        "randn instead of rand", THREAT, _UNIT,
        "            unit = rng.normal(seed, rng.Purpose.START, epoch, sample_ids, count, draw=draw).to(x.dtype)\n",
        "uniform_start_fills_the_ball_evenly",
    ),
    Mutation(
        "start in [0, eps) only", THREAT, "noise = (2.0 * unit - 1.0) * bounds.eps", "noise = unit * bounds.eps",
        "uniform_start_fills_the_ball_evenly",
    ),
    Mutation(
        "no-random-start still starts", THREAT, "            return self.project_into(x, bounds)\n        n, count",
        "            pass\n        n, count", "zero_start_is_the_clean_image",
    ),
    Mutation(
        "random start forgotten", THREAT, "self.project_into(x + noise.reshape(x.shape), bounds)",
        "self.project_into(x, bounds)", "uniform_start_is_not_the_clean_image",
    ),
    Mutation(
        "start not clipped to the box", THREAT, "bounds = self.bounds(x, eps=eps, box=clip)",
        "bounds = self.bounds(x, eps=eps, box=False)", "start_is_clipped_only_where_said",
    ),
    Mutation(
        "start depends on the position in the batch", PGD,
        "ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids",
        "ids = torch.arange(len(x), device=x.device)", "result_is_independent_of_the_batch",
    ),
    Mutation(
        "every epoch starts alike", THREAT, _UNIT, _UNIT.replace("epoch,", "0,"), "start_depends_on_its_keys_alone",
    ),
    Mutation(
        "seed ignored", THREAT, _UNIT, _UNIT.replace("(seed,", "(0,"), "start_depends_on_its_keys_alone",
    ),
    Mutation(
        "all restarts start alike", PGD, "draw=self.first_draw + restart,", "draw=0,", "restarts_keep_the_best",
    ),
    Mutation(
        "L2 start on the sphere only", THREAT, "noise = balls.l2_direction(normals) * share * bounds.eps",
        "noise = balls.l2_direction(normals) * bounds.eps", "l2_start_has_the_stated_law",
    ),
    Mutation(
        "L2 start is a projected cube", THREAT,
        "            normals = rng.normal(seed, rng.Purpose.START, epoch, sample_ids, count, draw=draw).to(x.dtype)\n",
        "            normals = rng.uniform(seed, rng.Purpose.START, epoch, sample_ids, count).to(x.dtype) - 0.5\n",
        "l2_start_has_the_stated_law",
    ),
    Mutation(
        "clean start when a Gaussian is below p", THREAT, "coin = rng.uniform(seed, rng.Purpose.CLEAN_START",
        "coin = rng.normal(seed, rng.Purpose.CLEAN_START", "clean_start_coin_has_its_probability",
    ),
    Mutation(
        "one coin an image where one a group was asked for", PGD,
        'coin_ids = group_ids if self.start_clean_scope == "group" else None', "coin_ids = None",
        "clean_start_coin_is_one_a_group",
    ),
    Mutation(
        "random target may equal the label", TARGETS, "offset = 1 + rng.below(num_classes - 1,",
        "offset = rng.below(num_classes,", "target_never_equals_label",
    ),
    Mutation(
        "one wrong class is never a target", TARGETS, "offset = 1 + rng.below(num_classes - 1,",
        "offset = 1 + rng.below(num_classes - 2,", "random_targets_are_even",
    ),
    Mutation(
        "most confusing class is the label itself", TARGETS,
        'return finite.masked_fill(own, float("-inf")).argmax(dim=1)', "return finite.argmax(dim=1)",
        "logit_targets_follow_the_logits",
    ),
    Mutation(
        "least likely class may be the label", TARGETS,
        'return finite.masked_fill(own, float("inf")).argmin(dim=1)', "return finite.argmin(dim=1)",
        "target_never_equals_label",
    ),
    Mutation(
        "target redrawn in every iteration", PGD, _STEP,
        _STEP + "            goal = goal._replace(targets=(goal.targets + 1) % 6 if goal.targets is not None else None)\n",
        "target_is_drawn_once_a_call",
    ),
    Mutation(
        "wrong sign of the targeted loss", LOSSES,
        '    return -F.cross_entropy(logits, goal.targets, reduction="none")',
        '    return F.cross_entropy(logits, goal.targets, reduction="none")', "targeted_attack_nears_its_target",
    ),
    Mutation(
        "targeted loss looks at the label", LOSSES, "return _at(logits, goal.targets) - _at(logits, goal.labels)",
        "return _at(logits, goal.labels) - _at(logits, goal.targets)", "targeted_attack_nears_its_target",
    ),
    Mutation(
        "untargeted attack descends", BALLS, "return linf_project(adv + step_size * sign, bounds)",
        "return linf_project(adv - step_size * sign, bounds)", "untargeted_attack_climbs",
    ),
    Mutation(
        "margin over all classes, the true one included", LOSSES,
        'return logits.masked_fill(own, float("-inf")).amax(dim=1)', "return logits.amax(dim=1)",
        "gradient_is_that_of_the_loss",
    ),
    Mutation(
        "box clip missing", BALLS, "return Bounds(down.clamp(low, high), up.clamp(low, high), x, eps)",
        "return Bounds(down, up, x, eps)", "box_holds_exactly",
    ),
    Mutation(
        "box clip missing after an L2 step", BALLS, _L2_STEP,
        _L2_STEP.replace("bounds.lower, bounds.upper", "float('-inf'), float('inf')"), "box_holds_exactly",
    ),
    Mutation(
        "ball projection missing", BALLS, "return torch.minimum(torch.maximum(adv, bounds.lower), bounds.upper)",
        "return adv.clamp(0, 1)", "ball_holds_exactly",
    ),
    Mutation(
        "ball exceeded by rounding", BALLS, "    down = torch.where(_rounding_error(x, -eps, down) > 0, torch.nextafter(down, x), down)\n",
        "", "ball_holds_exactly",
    ),
    Mutation(
        "ball around the previous iterate", PGD, _STEP,
        _STEP + "            bounds = self.threat.bounds(adv, eps=float(bounds.eps))\n", "radius_of_a_call_is_obeyed",
    ),
    Mutation(
        "L2 norm over the whole batch", BALLS, _L2_STEP,
        "    return l2_project(adv + step_size * grad / grad.norm(), bounds)\n", "step_is_the_stated_length",
    ),
    Mutation(
        "gradient used without its sign", BALLS,
        "    sign = (grad > 0).to(adv.dtype) - (grad < 0).to(adv.dtype)", "    sign = grad",
        "step_is_the_stated_length",
    ),
    Mutation(
        "NaN gradient spreads", BALLS, _L2_STEP,
        "    unit = torch.nn.functional.normalize(grad.flatten(1)).view_as(grad)\n"
        "    return l2_project(adv + step_size * unit, bounds)\n", "nan_gradient_moves_nothing",
    ),
    Mutation(
        "eps in grey levels", PGD, "threat=Threat(config.norm, config.eps / 255.0)",
        "threat=Threat(config.norm, config.eps / 256.0)", "recipe_units_are_grey_levels",
    ),
    Mutation(
        "eps in the units of normalised pixels", PGD, "threat=Threat(config.norm, config.eps / 255.0)",
        "threat=Threat(config.norm, config.eps * 2 / 255.0)", "recipe_units_are_grey_levels",
    ),
    Mutation(
        "radius of eight accepted", THREAT, 'if self.norm == "linf" and self.eps > high - low:', "if False:",
        "recipe_units_are_grey_levels",
    ),
    Mutation(
        "eps warm-up ignored", THREAT, "size = balls.radius(self.eps if eps is None else eps, x)",
        "size = balls.radius(self.eps, x)", "radius_of_a_call_is_obeyed",
    ),
    Mutation(
        "step rule ignored", PGD, "return max(self.step_size, self.threat.eps / self.num_steps)",
        "return self.step_size", "step_rule_reaches_the_ball",
    ),
    Mutation(
        "normalised images attacked", PGD, "if not (smallest >= low and largest <= high):", "if False:",
        "normalised_images_are_refused",
    ),
    Mutation(
        "first gradient at the clean image", PGD, "        seen: dict[int, torch.Tensor] = {}\n",
        "        seen: dict[int, torch.Tensor] = {}\n        adv = bounds.center\n",
        "first_step_leaves_from_the_start",
    ),
    Mutation(
        "step counted from the clean image", ITERATION, "return threat.step_into(adv, grad, step_size, bounds, fused=fused), logits",
        "return threat.step_into(bounds.center, grad, step_size, bounds), logits", "last_iterate_is_returned",
    ),
    Mutation(
        "last iterate but one returned", PGD, "for done in range(self.num_steps):", "for done in range(self.num_steps - 1):",
        "last_iterate_is_returned",
    ),
    Mutation(
        "only the first 64 images attacked", PGD, _STEP,
        _STEP + "            adv = torch.cat([adv[:64], bounds.center[64:]])\n", "every_image_is_attacked_every_step",
    ),
    Mutation(
        "an extra forward in every iteration", ITERATION, "        logits = checked_logits(model(image), image)\n",
        "        model(image)\n        logits = checked_logits(model(image), image)\n", "every_image_is_attacked_every_step",
    ),
    Mutation(
        "restarts keep the last", PGD, "best = found if best is None else best.better_of(found)", "best = found",
        "restarts_keep_the_best",
    ),
    Mutation(
        "restarts keep one winner for the whole batch", "attacks/results.py",
        "        take = fools_alone | higher\n",
        "        take = (other.loss.sum() > self.loss.sum()).expand_as(higher)\n", "restarts_keep_the_best",
    ),
    Mutation(
        "restarts rank by loss alone", "attacks/results.py", "        take = fools_alone | higher\n",
        "        take = other.loss > self.loss\n", "restarts_prefer_fooling_to_loss",
    ),
    Mutation(
        "trajectory recorded one step late", PGD, "            if done in record:\n                seen[done] = logits",
        "            if done + 1 in record:\n                seen[done + 1] = logits",
        "trajectory_agrees_with_shorter_attacks",
    ),
]  # fmt: skip
