"""Accelerated operations, one folder each: api (validation, dispatch), reference, implementations."""
