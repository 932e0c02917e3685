"""How many images a network that knows nothing of the test labels gets right: the exact law, and its tails.

A network is trained on the true labels of its images, permuted over the images and with the classes then renamed at
random. If nothing that it sees depends on the test labels, renaming the classes once more changes the law of nothing:
not of the labels, nor of the initial weights (the classifier's rows are drawn alike), and loss, optimiser, attack and
selection treat all names alike. So, given its confusion matrix N (N[c, k] test images of class c that it calls k) up to
the order of the columns, every order of the columns is equally likely, and the number of right answers is

    S = sum over c of N[c, t(c)],  t uniform over the K! orders.

Its mean is sum(N) / K, chance, whatever the shares p_c of the test labels and q_k of the predictions (it is
n * sum p_k q_k averaged over the names). Its variance is sum(d ** 2) / (K - 1), d being N less its row and column means
plus its mean (Hoeffding 1951, "A combinatorial central limit theorem"): the more the images of a class share a prediction,
the wider; independent answers alone scatter binomially. No normal or binomial law is assumed below: the K! orders are
counted. Runs of independent shuffles and seeds add up.
"""

from __future__ import annotations

import numpy as np


def right_answers(confusion: np.ndarray) -> np.ndarray:
    """Return P(S = 0), P(S = 1), … of one network, by counting orders of the columns over sets of columns used."""
    classes, most = len(confusion), int(confusion.max(axis=1).sum())
    counted = {0: np.eye(1, most + 1)[0]}  # set of columns given to the classes so far -> orders by right answers
    for row in confusion:
        grown: dict[int, np.ndarray] = {}
        for used, orders in counted.items():
            for column in range(classes):
                if used >> column & 1:
                    continue
                hits = int(row[column])
                into = grown.setdefault(used | 1 << column, np.zeros(most + 1))
                into[hits:] += orders[: most + 1 - hits]
        counted = grown
    (orders,) = counted.values()
    return orders / orders.sum()


def tails(confusions: list[np.ndarray]) -> tuple[float, float]:
    """Return P(so few right answers, or fewer) and P(so many, or more) over all networks together."""
    law = np.ones(1)
    for confusion in confusions:
        law = np.convolve(law, right_answers(confusion))
    found = sum(int(np.trace(confusion)) for confusion in confusions)
    return float(law[: found + 1].sum()), float(law[found:].sum())
