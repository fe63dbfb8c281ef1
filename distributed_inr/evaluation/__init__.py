"""Evaluation of finished runs."""

from distributed_inr.evaluation.evaluate import evaluate

__all__ = ["evaluate"]
