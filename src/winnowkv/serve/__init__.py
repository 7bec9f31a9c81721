"""An OpenAI-compatible HTTP server over the engine; needs the packages of ``winnowkv[serve]``."""
