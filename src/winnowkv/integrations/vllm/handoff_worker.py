"""What ``--worker-extension-cls`` names: vLLM imports it in each worker before the model is built.

Importing this module registers the listening attention backends (listening.py) in the process; nothing else imports it.
"""

from __future__ import annotations

from winnowkv.integrations.vllm.listening import register


class HandoffWorker:
    """A worker extension that adds nothing to vLLM's worker: it is there so that this module is imported."""


register()
