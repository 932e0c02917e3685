"""The optimisers' rules, one parameter at a time, as their papers and torch's documentation state them."""

from __future__ import annotations

import torch
from torch import Tensor


class Optimiser:
    """Keeps each parameter's state by name and moves the parameters."""

    def __init__(self, section: dict, trained: dict[str, Tensor]) -> None:
        self.section = section
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, weight in trained.items():
            self.state[name] = {key: torch.zeros_like(weight) for key in self._tensors()}
            if section["name"] not in ("sgd", "sgd_gc", "sgd_gcc", "rmsprop_tf"):
                self.state[name]["step"] = torch.zeros(())

    def _tensors(self) -> list[str]:
        momentum = ["momentum_buffer"] if self.section["momentum"] else []
        if self.section["name"] == "rmsprop_tf":
            return ["square_less_one", "momentum_buffer"]
        return {"sgd": momentum, "sgd_gc": momentum, "sgd_gcc": momentum, "rmsprop": ["square_avg", *momentum]}.get(
            self.section["name"], ["exp_avg", "exp_avg_sq"]
        )

    def decay(self, name: str, weight: Tensor) -> float:
        """Weight decay of a parameter: kernels have more than one dimension; biases and norms are vectors."""
        rule, kernel = self.section["weight_decay_rule"], weight.dim() > 1
        if rule not in ("all", "no_norm_bias", "kernels"):
            raise NotImplementedError(f"the reference knows no rule {rule!r} of weight decay")
        return self.section["weight_decay"] if rule == "all" or kernel else 0.0

    def move(self, name: str, weight: Tensor, gradient: Tensor, lr: float, momentum: float | None = None) -> Tensor:
        """Return the parameter after a step; ``momentum`` where a schedule moves it."""
        section, state, wd = self.section, self.state[name], self.decay(name, weight)
        kind, mu = section["name"], section["momentum"] if momentum is None else momentum
        if kind == "adamw":  # Loshchilov & Hutter 2019: decay beside the gradient, not in it
            weight = weight * (1 - lr * wd)
        else:
            gradient = gradient + wd * weight
        if kind == "sgd":
            if not mu:
                return weight - lr * gradient
            state["momentum_buffer"] = v = mu * state["momentum_buffer"] + gradient
            return weight - lr * (gradient + mu * v if section["nesterov"] else v)
        if kind in (
            "sgd_gc",
            "sgd_gcc",
        ):  # Yong et al. 2020, eq. 1, on the gradient with its decay, as Pang et al.'s code
            if weight.dim() >= {"sgd_gc": 2, "sgd_gcc": 4}[kind]:
                rows = gradient.reshape(len(gradient), -1)
                gradient = (rows - rows.mean(dim=1, keepdim=True)).view_as(weight)
            if mu:
                state["momentum_buffer"] = gradient = mu * state["momentum_buffer"] + gradient
            return weight - lr * gradient
        if kind == "rmsprop_tf":  # tf.train.RMSPropOptimizer: ms from 1, epsilon in the root, the rate in the momentum
            a = section["rmsprop_decay"]
            ms = a * (state["square_less_one"] + 1) + (1 - a) * gradient**2
            state["square_less_one"] = ms - 1
            state["momentum_buffer"] = mom = (
                mu * state["momentum_buffer"] + lr * gradient / (ms + section["eps"]).sqrt()
            )
            return weight - mom
        state["step"] = state["step"] + 1
        if kind == "rmsprop":
            a = section["rmsprop_decay"]
            state["square_avg"] = square = a * state["square_avg"] + (1 - a) * gradient**2
            update = gradient / (square.sqrt() + section["eps"])
            if mu:
                state["momentum_buffer"] = update = mu * state["momentum_buffer"] + update
            return weight - lr * update
        if kind in ("adam", "adamw"):
            t = float(state["step"])
            b = section["betas"]  # Kingma & Ba 2015: 0.9 and 0.999
            state["exp_avg"] = first = b[0] * state["exp_avg"] + (1 - b[0]) * gradient
            state["exp_avg_sq"] = second = b[1] * state["exp_avg_sq"] + (1 - b[1]) * gradient**2
            first, second = first / (1 - b[0] ** t), second / (1 - b[1] ** t)
            return weight - lr * first / (second.sqrt() + section["eps"])
        raise NotImplementedError(f"the reference knows no optimiser {kind!r}: write its rule here")
