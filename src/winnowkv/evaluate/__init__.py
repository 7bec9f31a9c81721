"""Evaluation. Importing it registers the model ``winnow`` with lm-evaluation-harness, if that is installed."""

from contextlib import suppress

with suppress(ImportError):  # not installed, or too old to take a model by its address
    from lm_eval.api.registry import model_registry

    model_registry.register("winnow", target="winnowkv.integrations.lm_eval:WinnowLM")
