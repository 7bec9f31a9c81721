"""What a result line of ``winnow eval`` must hold, so that every summary and page can be made of it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from winnowkv.budget import Budget
from winnowkv.evaluate.report.summary import Line, failed
from winnowkv.files import first_fault

LARGEST = 1e18  # bytes, tokens, seconds: above it sums have no end


def _budget(value: Any) -> Any:
    Budget(value)
    return value


Positive = Annotated[float, Field(gt=0, le=LARGEST)]
Amount = Annotated[float, Field(ge=0, le=LARGEST)]


class EvalLine(BaseModel):
    """Every line; fields that are not named here may hold anything."""

    model_config = ConfigDict(strict=True, extra="allow")

    task: str
    row: str
    protocol: str
    policy: str
    budget: Annotated[Any, AfterValidator(_budget)]
    score: Annotated[float, Field(ge=0, le=1)] | None
    failed: str | None = None
    model: str | None = None
    dtype: str | None = None
    answers: list[str] | None = None
    prompt_tail: str | None = None
    metric: str | None = None
    versions: dict[str, str] = {}
    git: str | None = None
    seed: int | None = None
    truncated_tokens: Annotated[int, Field(ge=0, le=10**18)] | None = None


class FinishedLine(EvalLine):
    """A line with a score."""

    prompt_tokens: Positive
    kept_entries: Positive
    kept_bytes: Amount
    full_bytes: Amount
    held_bytes: Amount
    prefill_s: Amount
    compress_s: Amount
    decode_s: Amount
    decode_tokens: Amount
    prediction: str


def line_fault(line: Line) -> str | None:
    """What is wrong with a line, None for a good one."""
    try:
        EvalLine.model_validate(line)
        if not failed(line):
            FinishedLine.model_validate(line)
    except ValidationError as error:
        return f"{first_fault(error)}, so it is no line of winnow eval"
    return None
