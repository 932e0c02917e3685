"""Writes docs/attacks.md from the entries themselves, so that the page cannot drift from what they do.

Run ``python -m distributed_at.attacks.page`` in a checkout after changing one.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from distributed_at.catalogue import attacks
from distributed_at.config import AttackConfig
from distributed_at.registry import Registry

_HEAD = """# Attacks

What the section `attack` of a recipe can name; this page is written from the entries in
`distributed_at/catalogue/attacks.py` and the schema by `python -m distributed_at.attacks.page`. All lengths in a recipe are
in /255; in Python they are in [0, 1].

```python
from distributed_at.attacks import PGD, Threat

attack = PGD(threat=Threat("linf", 8 / 255), num_steps=10, step_size=2 / 255)
adv = attack.perturb(model, x, y)  # any network: images in [0, 1] to logits
adv = attack.perturb(model, x, y, targets=classes)  # towards classes of your own
adv = attack.perturb(model, x, y, soft_labels=probabilities)
```

`PGD(gradient=...)` takes what finds the gradient, so that an estimate from queries alone makes it a black-box attack;
`first_draw` numbers the starts, so that restarts may be made one by one; `early_stop` leaves an image where it is once the
network got it wrong so often.

## Your own

One file, named by `plugins` in the recipe ([plugins.md](plugins.md)):

```python
import torch
from distributed_at.catalogue.attacks import AttackLoss, Update


def least_margin(logits, goal):
    \"\"\"Minus the square of how far the label's logit stands above the mean of all.\"\"\"
    own = logits.gather(1, goal.labels[:, None])[:, 0]
    return -(own - logits.mean(dim=1)).clamp(min=0).square()


class Momentum:
    \"\"\"Dong et al., Boosting adversarial attacks with momentum, 2018, algorithm 1.\"\"\"

    def begin(self, adv):
        return torch.zeros_like(adv)

    def step(self, adv, grad, state, *, step_size, bounds, ball):
        state = state + grad / grad.flatten(1).abs().sum(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        return ball.project(adv + step_size * state.sign(), bounds), state


ATTACK_LOSSES = {"least_margin": AttackLoss(title="least margin", source="this page", function=least_margin)}
ATTACK_UPDATES = {"momentum": Update(title="momentum", source="Dong et al. 2018", rule=Momentum())}
```

```yaml
attack: {eps: 8, num_steps: 10, step_size: 2, loss: least_margin, update: momentum}
```

Training and evaluation then take the names like the package's own; compiled and captured forms of the attack too, but for an
update rule with a state, of which the gradient alone is compiled.
"""
_SECTIONS = (
    ("loss", "ATTACK_LOSSES", "What the attack raises. Summed over a batch, never a mean."),
    ("target", "ATTACK_TARGETS", "The class that it aims at, chosen once a call and the same in all restarts."),
    ("start", "ATTACK_STARTS", "Where it begins; points are projected afterwards."),
    ("update", "ATTACK_UPDATES", "How a gradient moves the image."),
    ("step_rule", "STEP_RULES", "How long a step is."),
    ("norm", "BALLS", "What measures the perturbation."),
)


def attacks_page() -> str:
    """Return the page in Markdown."""
    parts = [_HEAD]
    for field, name, about in _SECTIONS:
        registry = getattr(attacks, name)
        rows = "\n".join(_row(registry, key) for key in registry.builtin)
        default = AttackConfig.model_fields[field].default
        parts.append(
            f"## `attack.{field}`\n\n{about} The default is `{default}`; a plug-in adds to `{name}`.\n\n"
            f"| name | what it is | source |\n| --- | --- | --- |\n{rows}\n"
        )
    fields = "\n".join(
        f"| `{name}` | {'required' if info.is_required() else f'`{info.default}`'} | {info.description or ''} |"
        for name, info in AttackConfig.model_fields.items()
    )
    parts.append(f"## All fields\n\n| field | default | meaning |\n| --- | --- | --- |\n{fields}\n")
    return "\n".join(parts)


def _row(registry: Registry[Any], name: str) -> str:
    entry = registry[name]
    loaded = entry.load() if hasattr(entry, "load") and getattr(entry, "choose", True) is not None else None
    about = inspect.getdoc(loaded if inspect.isfunction(loaded) else type(loaded)) if loaded is not None else None
    first = (about or "").split("\n\n")[0].replace("\n", " ").replace("``", "`")
    text = (f"{entry.title}. {first}" if first else entry.title).replace("|", "\\|")
    return f"| `{name}` | {text} | {getattr(entry, 'source', '')} |"


if __name__ == "__main__":
    path = Path(__file__).parents[2] / "docs" / "attacks.md"
    path.write_text(attacks_page(), encoding="utf-8")
    print(f"wrote {path}")
