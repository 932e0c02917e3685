"""Case -> the worlds in which it was trained, and the largest difference of each kind; filled by the tests, printed by conftest."""

TABLE: dict[str, tuple[list[str], dict[str, float]]] = {}
