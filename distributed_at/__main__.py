"""`python -m distributed_at`, the form in which workers are started."""

from distributed_at.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
