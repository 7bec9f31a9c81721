"""Every code block of the documentation runs, or says why it does not, and then names nothing that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.docs import pages, read_blocks
from support.docs_run import Model, Winnow, following
from winnowkv.models import load as models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(models.find_wheel() is None, reason=f"the embedded model is missing ({models.INSTALL})"),
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
]
WITH_CODE = [page for page in pages() if any(not block.is_plain for block in read_blocks(page))]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    one = Model()
    yield one
    one.short.remove()


@pytest.mark.parametrize("page", WITH_CODE)
def test_blocks_of_the_page(page: str, model: Model, winnow: Winnow, tmp_path: Path) -> None:
    with following(tmp_path, winnow, model) as reader:
        for block in read_blocks(page):
            reader.follow(block)
        if reader.address and "stored" in reader.names:  # a context of the page's server, which its last question was about
            assert reader.names["answer"].usage.winnow["context"] == reader.names["stored"]["id"]
