"""The pictures of README and docs, drawn from docs/data: ``python -m website.figures [NAME ...]`` (make figures).

One file a picture, each with ``RECORDS``, the records that it reads, and ``make(records, folder)``, which draws, and returns
the files. ``style.py`` is the look of all of them. docs/pictures/serve.png alone is not made here: it shows a server that
answers, and ``benchmarks/serve_picture.py`` takes it.
"""

from __future__ import annotations

BOTH = (".svg", ".png")
# What each picture's module writes into docs/pictures.
FILES: dict[str, tuple[str, ...]] = {
    **{
        name: tuple(name + ending for ending in BOTH)
        for name in ("agreement", "needle_map", "decode", "throughput", "first_token", "auto_promise", "demo")
    },
    "policies": ("policies.png",),
    "explain_shot": ("explain.png",),
}
