"""Bugs planted in a copy of the attacks: those seen in other implementations, and their kin."""

from tests.conformance.product import Mutation

PGD, BALLS, THREAT = "attacks/pgd.py", "attacks/balls.py", "attacks/threat.py"
ITERATION, LOSSES, TARGETS = "attacks/iteration.py", "attacks/losses.py", "attacks/targets.py"
STARTS, COUNTERS = "attacks/starts.py", "attacks/counters.py"
UPDATES, FACTS = "attacks/updates.py", "catalogue/attacks.py"

_L2_STEP = "        return reference.l2_step(adv, bounds.center, grad, bounds.eps, step_size, -1.0, bounds.lower, bounds.upper)\n"
_GRADIENT = "        (grad,) = torch.autograd.grad(total, image)\n"
_STEP = "            adv = moved\n"
_UNIT = "        unit = counters.uniform(x[0].numel() if len(x) else 0).to(x.dtype)\n"
_DRAWN = "        return rng.uniform(self.seed, purpose, self.epoch, self.sample_ids, count, draw=self.draw)\n"
_MASKED = "    return finite.masked_fill(own, instead)"

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
        "        total = loss(at_least_float32(logits), _looking_again(model, goal)).sum() * loss_scale\n        (grad,)",
        "        total = loss(at_least_float32(logits), _looking_again(model, goal)).mean() * loss_scale\n        (grad,)",
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
        "global generator used for the start", BALLS, _UNIT,
        "        unit = torch.rand((len(x), x[0].numel()), dtype=x.dtype)\n", "global_generators_are_untouched",
    ),
    Mutation(
        "randn instead of rand", BALLS, _UNIT, _UNIT.replace("uniform", "normal"),
        "uniform_start_fills_the_ball_evenly",
    ),
    Mutation(
        "start in [0, eps) only", BALLS, "return reference.uniform_noise(unit, eps)", "return (eps * unit)",
        "uniform_start_fills_the_ball_evenly",
    ),
    Mutation(
        "no-random-start still starts", STARTS, "    return x\n", "    return x + eps / 2\n", "zero_start_is_the_clean_image",
    ),
    Mutation(
        "random start forgotten", THREAT, "start = ball.project(point,", "start = ball.project(x,", "uniform_start_is_not_the_clean_image",
    ),
    Mutation(
        "start not clipped to the box", THREAT, "self.bounds(x, eps=eps, box=clip)",
        "self.bounds(x, eps=eps, box=False)", "start_is_clipped_only_where_said",
    ),
    Mutation(
        "start depends on the position in the batch", PGD,
        "ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids",
        "ids = torch.arange(len(x), device=x.device)", "result_is_independent_of_the_batch",
    ),
    Mutation(
        "every epoch starts alike", COUNTERS, _DRAWN, _DRAWN.replace("self.epoch", "0"), "start_depends_on_its_keys_alone",
    ),
    Mutation(
        "seed ignored", COUNTERS, _DRAWN, _DRAWN.replace("self.seed", "0"), "start_depends_on_its_keys_alone",
    ),
    Mutation(
        "all restarts start alike", PGD, "draw=self.first_draw + restart,", "draw=0,", "restarts_keep_the_best",
    ),
    Mutation(
        "L2 start on the sphere only", BALLS, "l2_direction(normals) * share * eps", "l2_direction(normals) * eps", "l2_start_has_the_stated_law",
    ),
    Mutation(
        "L2 start is a projected cube", BALLS,
        "        normals = counters.normal(x[0].numel() if len(x) else 0).to(x.dtype)\n",
        "        normals = counters.uniform(x[0].numel() if len(x) else 0).to(x.dtype) - 0.5\n",
        "l2_start_has_the_stated_law",
    ),
    Mutation(
        "clean start with the other probability", THREAT, "stays_clean(coins, clean_probability,",
        "stays_clean(coins, 1 - clean_probability,", "clean_start_coin_has_its_probability",
    ),
    Mutation(
        "one coin an image where one a group was asked for", PGD,
        'coin_ids = group_ids if self.start_clean_scope == "group" else None', "coin_ids = None",
        "clean_start_coin_is_one_a_group",
    ),
    Mutation(
        "random target may equal the label", TARGETS, "labels + 1 + _below(num_classes - 1, counters)",
        "labels + _below(num_classes, counters)", "target_never_equals_label",
    ),
    Mutation(
        "one wrong class is never a target", TARGETS, "labels + 1 + _below(num_classes - 1, counters)",
        "labels + 1 + _below(num_classes - 2, counters)", "random_targets_are_even",
    ),
    Mutation(
        "most confusing class is the label itself", TARGETS,
        'return _wrong(labels, num_classes, logits, float("-inf")).argmax(dim=1)', "return logits.argmax(dim=1)",
        "logit_targets_follow_the_logits",
    ),
    Mutation(
        "least likely class may be the label", TARGETS,
        'return _wrong(labels, num_classes, logits, float("inf")).argmin(dim=1)', "return logits.argmin(dim=1)",
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
        "untargeted attack descends", BALLS, "self.project(adv + step_size * reference.sign(grad, adv.dtype), bounds)",
        "self.project(adv - step_size * reference.sign(grad, adv.dtype), bounds)", "untargeted_attack_climbs",
    ),
    Mutation(
        "margin over all classes, the true one included", LOSSES,
        'return logits.masked_fill(own, float("-inf")).amax(dim=1)', "return logits.amax(dim=1)",
        "gradient_is_that_of_the_loss",
    ),
    Mutation(
        "box clip missing", BALLS, "return Bounds(*reference.linf_interval(x, eps, (low, high)), x, eps)",
        "return Bounds(*reference.linf_interval(x, eps, (-9.0, 9.0)), x, eps)", "box_holds_exactly",
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
        "ball exceeded by rounding", BALLS, "return Bounds(*reference.linf_interval(x, eps, (low, high)), x, eps)",
        "return Bounds((x - eps).clamp(low, high), (x + eps).clamp(low, high), x, eps)", "ball_holds_exactly",
    ),
    Mutation(
        "ball around the previous iterate", PGD, _STEP,
        _STEP + "            bounds = self.threat.bounds(adv, eps=float(bounds.eps))\n", "radius_of_a_call_is_obeyed",
    ),
    Mutation(
        "L2 norm over the whole batch", BALLS, _L2_STEP,
        "        return self.project(adv + step_size * grad / grad.norm(), bounds)\n", "step_is_the_stated_length",
    ),
    Mutation(
        "gradient used without its sign", BALLS, "reference.sign(grad, adv.dtype)", "grad",
        "step_is_the_stated_length",
    ),
    Mutation(
        "NaN gradient spreads", BALLS, _L2_STEP,
        "        unit = torch.nn.functional.normalize(grad.flatten(1)).view_as(grad)\n"
        "        return self.project(adv + step_size * unit, bounds)\n", "nan_gradient_moves_nothing",
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
        "radius of eight accepted", THREAT, 'if facts.per_pixel and self.eps > high - low:', "if False:",
        "recipe_units_are_grey_levels",
    ),
    Mutation(
        "eps warm-up ignored", THREAT, "return self.ball.bounds(x, balls.radius(self.eps if eps is None else eps, x), low, high)",
        "return self.ball.bounds(x, balls.radius(self.eps, x), low, high)", "radius_of_a_call_is_obeyed",
    ),
    Mutation(
        "step rule ignored", FACTS, "max(step, eps / steps) if steps else step", "step", "step_rule_reaches_the_ball",
    ),
    Mutation(
        "normalised images attacked", "attacks/inputs.py", "if not (smallest >= low and largest <= high):", "if False:",
        "normalised_images_are_refused",
    ),
    Mutation(
        "first gradient at the clean image", PGD, "        seen: dict[int, torch.Tensor] = {}\n",
        "        seen: dict[int, torch.Tensor] = {}\n        adv = bounds.center\n",
        "first_step_leaves_from_the_start",
    ),
    Mutation(
        "step counted from the clean image", ITERATION, "else step(adv, grad, step_size, bounds)), logits",
        "else step(bounds.center, grad, step_size, bounds)), logits", "last_iterate_is_returned",
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
    Mutation(
        "soft labels ignored", LOSSES, "goal.labels if goal.soft_labels is None else goal.soft_labels.to(logits.dtype)",
        "goal.labels", "cross_entropy_is_its_formula",
    ),
    Mutation(
        "divergence the other way round", LOSSES,
        "    return (reference.exp() * (reference - F.log_softmax(logits, dim=1))).sum(dim=1)",
        "    adv = F.log_softmax(logits, dim=1)\n    return (adv.exp() * (adv - reference)).sum(dim=1)",
        "divergence_is_its_formula",
    ),
    Mutation(
        "margin without the true logit", LOSSES, "return _largest_other(logits, goal.labels) - _at(logits, goal.labels)",
        "return _largest_other(logits, goal.labels)", "margin_is_its_formula",
    ),
    Mutation(
        "targeted DLR with the spread of the untargeted", LOSSES, "0.5 * (ranked[:, 2] + ranked[:, 3])", "ranked[:, 2]",
        "dlr_is_its_formula",
    ),
    Mutation(
        "Gaussian start uniform", STARTS, "counters.normal(x[0].numel() if len(x) else 0)",
        "(counters.uniform(x[0].numel() if len(x) else 0) * 2 - 1)", "gaussian_start_has_its_width",
    ),
    Mutation(
        "class of random_any is never the label", TARGETS, "    return _below(num_classes, counters)",
        "    return (labels + 1 + _below(num_classes - 1, counters)) % num_classes", "random_targets_are_even",
    ),
    Mutation(
        "Adam without bias correction", UPDATES, "mean / (1 - self.betas[0] ** count)", "mean",
        "adam_ascends_as_its_paper_says",
    ),
    Mutation(
        "Adam descends", UPDATES, "adv + step_size * unbiased", "adv - step_size * unbiased",
        "adam_ascends_as_its_paper_says",
    ),
    Mutation(
        "Adam's state outlives a restart", UPDATES, "return torch.zeros_like(adv), torch.zeros_like(adv), 0",
        "self.kept = getattr(self, 'kept', None) or (torch.zeros_like(adv), torch.zeros_like(adv), 5)\n        return self.kept",
        "adam_ascends_as_its_paper_says",
    ),
    Mutation(
        "schedule of steps begins one step early", PGD, "            if done in factors:\n                length *= factors[done]",
        "            if done + 1 in factors:\n                length *= factors[done + 1]", "steps_follow_their_schedule",
    ),
    Mutation(
        "factors of the schedule do not multiply", PGD, "length *= factors[done]",
        "length = self.effective_step_size * factors[done]", "steps_follow_their_schedule",
    ),
    Mutation(
        "early stop counts in a row", PGD, "wrong += predicted_classes(logits) != goal.labels",
        "wrong = (wrong + 1) * (predicted_classes(logits) != goal.labels)", "early_stop_counts_each_image_s_mistakes",
    ),
    Mutation(
        "early stop one forward late", PGD, "moving = (wrong < self.early_stop)", "moving = (wrong <= self.early_stop)",
        "early_stop_counts_each_image_s_mistakes",
    ),
    Mutation(
        "the clean images are looked at before the adversarial ones", ITERATION,
        "        logits = checked_logits(model(image), image)\n        total = loss(at_least_float32(logits), _looking_again(model, goal))",
        "        goal = _looking_again(model, goal)\n        logits = checked_logits(model(image), image)\n"
        "        total = loss(at_least_float32(logits), goal)",
        "clean_image_is_looked_at_as_often_as_said",
    ),
    Mutation(
        "final forward forgotten", PGD, "                    if self.final_forward:\n                        model(adv)\n", "",
        "clean_image_is_looked_at_as_often_as_said",
    ),
    Mutation(
        "targets of a call ignored", PGD, "        if targets is None:\n            classes = self.num_classes if clean",
        "        if True:\n            classes = self.num_classes if clean", "targets_of_a_call_are_aimed_at",
    ),
    Mutation(
        "soft labels do not reach the loss", PGD, "            soft_labels=soft_labels,\n            clean=x if again else None,",
        "            clean=x if again else None,", "soft_labels_of_a_call_are_climbed",
    ),
    Mutation(
        "another gradient is not used", PGD, "gradient=self.gradient or autograd", "gradient=autograd",
        "another_gradient_is_the_one_used",
    ),
]  # fmt: skip
