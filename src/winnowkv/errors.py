"""The error tree. Every message names the value, the limit and the way out."""


class WinnowError(Exception):
    """Base of everything this package raises on purpose."""


class BudgetError(WinnowError, ValueError):
    """A budget that cannot be kept: zero, negative, above 1 as a fraction, below sinks + window."""


class PolicyError(WinnowError, ValueError):
    """An unknown policy, an unknown or ill-typed option, a missing task."""


class InputError(WinnowError, ValueError):
    """A prompt, a mask or a file that cannot be used as it is."""


class UnknownContextError(InputError):
    """A context that is not in its store, or no longer."""


class UnsupportedModelError(WinnowError):
    """A model whose attention or cache does not go through transformers' two sockets."""


class ModelNotFoundError(WinnowError):
    """A model that is neither embedded, nor a folder, nor reachable on the hub."""


class ProfileError(WinnowError, ValueError):
    """A calibration profile that is missing, broken, too new, or of another model."""


class HubError(WinnowError):
    """A repository of the Hugging Face Hub that cannot be reached, read or written."""


class CacheError(WinnowError):
    """A compact cache used after its end, or asked for what eviction made impossible."""


class StoreError(CacheError):
    """A store of contexts that cannot be written: a full disk, no permission."""


class UnsupportedEngineError(WinnowError):
    """Another engine (vLLM), or a release or setting of it, in which contexts cannot be served."""
