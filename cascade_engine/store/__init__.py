"""The feature store: plain Zarr v3 whose commits are atomic and whose rows map into memory."""

from cascade_engine.store.feature_store import FeatureStore as FeatureStore

__all__ = ["FeatureStore"]
