"""``python -m lightning_guard`` is ``lightning-guard``."""

from lightning_guard.cli import main

if __name__ == "__main__":  # and not when a worker of a data loader imports it
    raise SystemExit(main())
