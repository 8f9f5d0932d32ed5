"""What guards that make a model smaller share: copies of it, schedules, masks, and changes of shape."""

from lightning_guard.compression.loading import load_reshaped

__all__ = ["load_reshaped"]
