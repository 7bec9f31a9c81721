"""What tests share: cases, tiny models, slow references, made-up results. Fixtures are in conftest.py."""
