"""Measures any logits function; knows no model."""
