"""Exports as GGUF: read back with gguf, with transformers' own reader, and run in llama.cpp where it is installed."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import minitron
from minitron.errors import UserError
from minitron.formats.agreement import TEXTS
from minitron.formats.gguf import architectures, file, llama_cpp
from minitron.formats.gguf.check import divergence
from minitron.formats.gguf.limits import require_architecture
from minitron.formats.gguf.ollama import modelfile
from minitron.formats.gguf.source import Source
from minitron.formats.gguf.tensors import encoded as encoded_tensor
from minitron.formats.gguf.vocabulary import GPT4O, LLAMA3, QWEN2, TEKKEN, read_vocabulary
from minitron.history import HISTORY, History, history_of
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.source import resolve_teacher
from minitron.reports.steps import stored_weights
from tests.conftest import make_config, make_model
from tests.exports import EXPORTED, VOCABULARY, copy_of, make_exported, merging_tokenizer

READ_BY_TRANSFORMERS = (
    "llama", "llama-tied", "llama-llama3", "qwen2", "qwen3-tied", "qwen3_moe", "nemotron", "gemma2",
    "gemma3", "phi3", "gpt2",
)  # fmt: skip
IDS = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(2))
needs_quantiser = pytest.mark.skipif(
    not llama_cpp.is_installed(llama_cpp.QUANTISER), reason="llama-cpp-python is not installed"
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return the folder of a tiny model and of its export in float32, made once."""

    @cache
    def make(name: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        model = make_exported(folder / "model", name)
        return model, minitron.export(model, folder / "out", format="gguf").file

    return make


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file, dequantised."""
    read = gguf.GGUFReader(path).tensors
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in read}


def entries_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()  # type: ignore[no-any-return]


def undone(name: str, value: np.ndarray, checkpoint: Checkpoint) -> np.ndarray:
    """Return a tensor of a Llama as the checkpoint has it: row 2i + j of a head is its row i + j times half."""
    if not re.search(r"attn_[qk]\.", name):
        return value
    width = checkpoint.arch.axis_size("head_dim")
    rows = [head * width + 2 * (row % (width // 2)) + row // (width // 2)
            for head in range(len(value) // width) for row in range(width)]  # fmt: skip
    return value[rows]


@pytest.mark.parametrize("name", EXPORTED)
def test_every_tensor_is_in_the_file_once_and_finite(name: str, exported: Callable[[str], tuple[Path, Path]]) -> None:
    folder, path = exported(name)
    checkpoint, tensors, entries = open_checkpoint(folder), tensors_of(path), entries_of(path)
    arch = entries["general.architecture"]
    names = gguf.get_tensor_name_map(
        next(known for known, text in gguf.MODEL_ARCH_NAMES.items() if text == arch), checkpoint.arch.axis_size("layer")
    )
    accepted = {found for _, found in names.mapping.values()}
    assert {re.sub(r"\.(weight|bias)$", "", tensor) for tensor in tensors} <= accepted | {"rope_freqs"} | {
        "rope_factors_long",
        "rope_factors_short",
    }
    assert all(np.isfinite(value).all() for value in tensors.values())
    stored = sum(tensor.size for tensor in tensors.values() if tensor.size)
    counted = checkpoint.arch.num_parameters + sum(
        np.prod(row.shape(checkpoint.arch.axis_size)) * len(checkpoint.arch.layer_numbers(row.kind))
        for row in checkpoint.arch.rows
        if row.is_buffer
    )
    doubled = tensors["token_embd.weight"].size if checkpoint.arch.flags.get("tie_word_embeddings") else 0
    factors = sum(value.size for tensor, value in tensors.items() if tensor.startswith("rope_"))
    assert stored - factors in {counted, counted + doubled}
    assert len(entries["tokenizer.ggml.tokens"]) == VOCABULARY == len(tensors["token_embd.weight"])


@pytest.mark.parametrize("name", ["llama", "llama-biases", "mistral-wide"])
def test_the_tensors_of_a_llama_are_those_of_the_checkpoint(
    name: str, exported: Callable[[str], tuple[Path, Path]]
) -> None:
    folder, path = exported(name)
    checkpoint, tensors = open_checkpoint(folder), tensors_of(path)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    differing = 0
    for stored in checkpoint.tensors:
        found = names.get_name(stored, try_suffixes=(".weight", ".bias"))
        expected = checkpoint.tensor(stored).numpy()
        np.testing.assert_array_equal(undone(found, tensors[found], checkpoint), expected)
        differing += not np.array_equal(tensors[found], expected)
    assert differing == 8 * (2 if name == "llama-biases" else 1)  # the control: queries and keys are reordered


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_model_back(name: str, exported: Callable[[str], tuple[Path, Path]]) -> None:
    folder, path = exported(name)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(read_back(path, folder)), logits_of(original), atol=2e-4, rtol=1e-3)


def read_back(path: Path, folder: Path) -> Any:
    """Return the model of a file as transformers reads its tensors; of the metadata it does not read all."""
    options = {"gguf_file": path.name, "config": AutoConfig.from_pretrained(folder), "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()


def test_a_file_without_the_reordering_is_read_as_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_exported(tmp_path / "model", "llama")
    monkeypatch.setitem(architectures.ARCHITECTURES, "llama", replace(architectures.LLAMA, pieces={}))
    path = minitron.export(folder, tmp_path / "out", format="gguf").file
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert float((logits_of(read_back(path, folder)) - logits_of(original)).abs().max()) > 0.1


@pytest.mark.parametrize("name", EXPORTED)
def test_llama_cpp_computes_the_model(name: str, exported: Callable[[str], tuple[Path, Path]]) -> None:
    folder, path = exported(name)
    context = Source.of(open_checkpoint(folder)).context
    ids = IDS[:, : context - 1]  # the server generates a token after the longest part
    expected = logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), ids)[0].log_softmax(
        -1
    )
    [whole] = llama_cpp.read(path, [], ids.tolist(), likeliest=expected.shape[1]).predictions
    kl = divergence(expected, whole)
    assert whole.tokens.shape == expected.shape
    assert float(kl.mean()) < 1e-3
    assert float((expected.argmax(-1) == torch.from_numpy(whole.tokens[:, 0])).float().mean()) >= 0.95
    assert float(divergence(expected.roll(1, 0), whole).mean()) > 10 * float(kl.mean())  # the control


def test_unlisted_tokens_are_compared_as_one_class() -> None:
    p, q = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    ranked = q.sort(descending=True)
    listed = {n: llama_cpp.Prediction(ranked.indices[:, :n].numpy(), ranked.values[:, :n].numpy()) for n in (8, 32)}
    exact = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(divergence(p, listed[32]), exact)
    lumped = []
    for each in (p, q):
        first, others = each.gather(1, ranked.indices).exp().split([8, 24], dim=1)
        lumped.append(torch.cat([first, others.sum(1, keepdim=True)], dim=1))
    expected = (lumped[0] * (lumped[0] / lumped[1]).log()).sum(-1)
    torch.testing.assert_close(divergence(p, listed[8]), expected)
    assert bool((divergence(p, listed[8]) < exact).all())


def test_llama_cpp_reads_the_tokens_that_transformers_reads(exported: Callable[[str], tuple[Path, Path]]) -> None:
    folder, path = exported("llama")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in (*TEXTS, "<s>user\nHi<tool></s>")]
    assert llama_cpp.read(path, [*TEXTS, "<s>user\nHi<tool></s>"], [], likeliest=1).ids == ids
    assert max(map(max, ids)) > 256  # merges and special tokens are among them


@needs_quantiser
def test_llama_cpp_quantises(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama", vocab_size=VOCABULARY, hidden_size=256, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=64, intermediate_size=256)  # fmt: skip
    merging_tokenizer().save_pretrained(folder)
    done = minitron.export(folder, tmp_path / "out", quantize="q4_k_m", format="gguf")
    assert done.record["tensors"]["q4_k"] > 0
    assert sorted(path.name for path in done.out.iterdir()) == ["Modelfile", "export.json", "model-q4_k_m.gguf"]


@pytest.mark.parametrize(
    ("options", "extra"), [({"quantize": "q4_k_m"}, "llama-cpp-python"), ({"check": "llama.cpp"}, "llama-cpp")]
)
def test_what_needs_llama_cpp_says_so_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], extra: str
) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda package=None: False)
    folder = make_exported(tmp_path / "model", "llama")
    with pytest.raises(UserError, match=rf"needs llama.cpp: pip install 'minitron\[{extra}\]'"):
        minitron.export(folder, tmp_path / "out", **options, format="gguf")
    assert not (tmp_path / "out").exists()


def test_an_export_is_checked_in_llama_cpp(tmp_path: Path) -> None:
    folder = make_exported(tmp_path / "model", "llama")
    checked = minitron.export(folder, tmp_path / "out", format="gguf", check="llama.cpp").record["checked"]
    assert checked["kl"] < 1e-6
    assert checked["agreement"] > 0.98  # the random model has tokens that are equally likely but for rounding
    assert checked["texts_with_equal_tokens"] == checked["texts"] == len(TEXTS)


def test_sizes_are_stated_where_they_do_not_follow(exported: Callable[[str], tuple[Path, Path]]) -> None:
    entries = entries_of(exported("mistral-wide")[1])
    lengths = ("key_length", "value_length")
    assert [entries[f"llama.attention.{name}"] for name in lengths] == [16, 16]
    assert entries["llama.rope.dimension_count"] == 16
    assert entries["llama.context_length"] == 16  # the window, which llama.cpp does not compute
    assert entries_of(exported("llama")[1])["llama.context_length"] == 256
    assert entries_of(exported("qwen2-wide")[1])["general.architecture"] == "llama"
    assert entries_of(exported("qwen2")[1])["general.architecture"] == "qwen2"
    odd = entries_of(exported("gemma2-odd")[1])
    assert odd["gemma2.attention.sliding_window_pattern"] == [False, True, True, False]
    hybrid = entries_of(exported("nemotron_h")[1])
    assert hybrid["nemotron_h.attention.head_count_kv"] == [0, 0, 3, 0, 0, 3, 0, 0]
    assert hybrid["nemotron_h.feed_forward_length"] == [0, 64, 0, 0, 64, 0, 0, 64]


def test_what_is_written_is_recorded(exported: Callable[[str], tuple[Path, Path]]) -> None:
    _, path = exported("llama-tied")
    record = json.loads((path.parent / "export.json").read_text())
    assert record["file"] == path.name == "model-f32.gguf"
    assert record["checked"] is None
    assert record["tensors"] == {"f32": len(tensors_of(path))}
    assert record["num_bytes"] == path.stat().st_size


def test_a_teacher_that_is_read_from_a_file_states_the_types_of_its_weights(tmp_path: Path) -> None:
    folder = make_exported(tmp_path / "model", "llama")
    paths = {
        kind: minitron.export(folder, tmp_path / kind, format="gguf", quantize=kind).file for kind in ("f32", "q8_0")
    }
    read = resolve_teacher(str(paths["q8_0"]))
    step = {"step": "dequantise", "method": "gguf", "types": ["Q8_0"], "dtype": "float32"}
    assert history_of(read).steps == (step,)
    assert stored_weights(step) == "GGUF, Q8_0"
    assert history_of(resolve_teacher(str(paths["f32"]))).steps == ()  # the control: nothing was quantised
    # Folders that were made before histories had this step, and cards that have changed since.
    (read / HISTORY).unlink()
    (read / "README.md").write_text("---\nlicense: mit\n---\n")
    assert history_of(resolve_teacher(str(paths["q8_0"]))) == History(card={"license": "mit"}, steps=(step,))


def test_eight_bits_are_near_and_narrow_rows_stay_in_sixteen(tmp_path: Path) -> None:
    folder = make_exported(tmp_path / "model", "llama")
    exact = tensors_of(minitron.export(folder, tmp_path / "exact", format="gguf").file)
    done = minitron.export(folder, tmp_path / "out", quantize="q8_0", format="gguf")
    rough = tensors_of(done.file)
    assert exact.keys() == rough.keys()
    for name, value in exact.items():
        assert np.abs(rough[name] - value).max() <= np.abs(value).max() / 127
    assert done.record["tensors"] == {"f16": 26, "q8_0": 4, "f32": 9}  # rows of 48 do not fit blocks of 32
    assert max(np.abs(rough[name] - value).max() for name, value in exact.items()) > 0


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "opt": ("opt", {}, "llama.cpp does not run opt models: its converter does not know OPTForCausalLM"),
    "activation": ("llama", {"hidden_act": "gelu"}, "it computes with hidden_act silu or swish, and this"),
    "bias": ("smollm3", {"no_rope_layers": [1, 1, 1, 0], "attention_bias": True}, "attention_bias False, and this"),
    "rope order": ("smollm3", {}, "no rotary embedding in every 4th layer"),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rotary embeddings it computes default, linear, yarn, llama3, longrope here, and this model has dynamic",
    ),
    "untied": ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings True, and this model has False"),
    "caps": ("gemma2", {"final_logit_softcapping": None}, "it caps logits and attention scores always"),
    "wide olmo2": ("olmo2", {"attention_bias": False, "num_attention_heads": 4, "num_key_value_heads": 2,
                             "head_dim": 16}, "48 is not 4 × 16"),
    "experts": ("qwen3_moe", {"norm_topk_prob": True}, "it expects experts in every layer"),
    "weights": ("qwen3_moe", {"mlp_only_layers": []}, "it computes with norm_topk_prob True"),
    "gate": ("falcon_h1", {}, "it has the norm of a mixer after the gate"),
    "both": ("nemotron_h", {"use_bias": False}, "it expects experts in every layer that has an MLP"),
    "mixer bias": ("mamba2", {}, "it computes with use_bias False"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    variant, changes, message = REFUSED[name]
    folder = make_model(tmp_path / "model", variant, **changes)
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        minitron.export(folder, tmp_path / "out", format="gguf")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "gguff"}, "--format gguff: did you mean 'gguf'?"),
        ({"format": None}, "export needs --format"),
        ({"check": "vllm"}, "--check vllm: this format is checked in llama.cpp"),
        ({"quantize": "q4_k"}, "--quantize q4_k: did you mean 'q4_k_"),
        ({"out": None}, "export needs OUT"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    folder = make_exported(tmp_path / "model", "llama")
    with pytest.raises(UserError, match=re.escape(message)):
        minitron.export(folder, **{"out": tmp_path / "out", "format": "gguf", **options})
    assert not (tmp_path / "out").exists()


def test_nothing_remains_of_an_export_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_exported(tmp_path / "model", "llama")
    kept = minitron.export(folder, tmp_path / "out", format="gguf").file.read_bytes()
    written, encoded = [], encoded_tensor

    def fail_later(*arguments: Any) -> np.ndarray:
        written.append(1)
        if len(written) > 20:
            raise OSError(28, "No space left on device")
        return encoded(*arguments)

    monkeypatch.setattr(file, "encoded", fail_later)
    for name in ("new", "out"):
        with pytest.raises(OSError, match="No space left"):
            minitron.export(folder, tmp_path / name, overwrite=True, format="gguf")
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "out" / "model-f32.gguf").read_bytes() == kept
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".lock") == [
        "Modelfile", "export.json", "model-f32.gguf"
    ]  # fmt: skip


def test_numbers_beyond_float16_are_named(tmp_path: Path) -> None:
    folder = make_exported(tmp_path / "model", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight holds numbers beyond the range of float16"):
        minitron.export(folder, tmp_path / "out", quantize="f16", format="gguf")
    assert minitron.export(folder, tmp_path / "out", quantize="bf16", format="gguf").record["tensors"]["bf16"] == 30


def test_a_window_that_shortens_the_context_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_exported(tmp_path / "model", "mistral-wide")
    with caplog.at_level(logging.WARNING):
        minitron.export(folder, tmp_path / "out", format="gguf")
    assert "the file states a context of 16 tokens, the model's window, in place of 256" in caplog.text


def test_the_vocabulary_is_the_tokenizer_that_runs() -> None:
    tokenizer = merging_tokenizer()
    vocabulary = read_vocabulary(tokenizer, 310, [tokenizer.eos_token_id, 5])
    assert (vocabulary.model, vocabulary.split) == ("gpt2", "gpt-2")
    assert vocabulary.tokens[:300] == [tokenizer.convert_ids_to_tokens(i) for i in range(300)]
    assert vocabulary.tokens[303:] == [f"[PAD{i}]" for i in range(303, 310)]
    assert vocabulary.types[299:304] == [gguf.TokenType.NORMAL, *[gguf.TokenType.CONTROL] * 2,
                                         gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED]  # fmt: skip
    assert vocabulary.special == {"bos": 300, "eos": 301, "eot": 5}
    assert vocabulary.adds == {"bos": False, "eos": False}
    with pytest.raises(UserError, match="has a token 302, and the model embeddings for 302 tokens"):
        read_vocabulary(tokenizer, 302, [])


def sentencepiece() -> PreTrainedTokenizerFast:
    """Return a tokenizer as those made of SentencePiece models: merges of characters, bytes for what is unknown."""
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("a", "t"), ("c", "at"), ("▁", "cat"), ("s", "at"), ("h", "a")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁thecatsm", *("".join(m) for m in merges)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def merged_by_score(text: str, tokens: list[str], scores: list[float]) -> list[str]:
    """Merge the neighbours that make the token of the highest score, the first such pair first, as llama.cpp does."""
    score = dict(zip(tokens, scores, strict=True))
    pieces = list(text)
    while candidates := [(-score[a + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in score]:
        _, i = min(candidates)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def test_scores_merge_in_the_order_of_the_tokenizer() -> None:
    tokenizer = sentencepiece()
    vocabulary = read_vocabulary(tokenizer, 300, [2])
    assert (vocabulary.model, vocabulary.adds, vocabulary.adds_space) == ("llama", {"bos": True, "eos": False}, True)
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.BYTE]
    assert vocabulary.types[:4] == kinds
    text = "the cat sat that"
    expected = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    spaced = "▁" + text.replace(" ", "▁")
    assert merged_by_score(spaced, vocabulary.tokens, vocabulary.scores) == expected
    reversed_order = [-score for score in vocabulary.scores]
    assert merged_by_score(spaced, vocabulary.tokens, reversed_order) != expected


def split_by(pattern: str, ignore_merges: bool) -> PreTrainedTokenizerFast:
    fast = merging_tokenizer()
    stated = json.loads(fast.backend_tokenizer.to_str())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    stated["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_only]}
    stated["model"]["ignore_merges"] = ignore_merges
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(stated)), eos_token="</s>")


@pytest.mark.parametrize(
    ("pattern", "ignore_merges", "name"),
    [(LLAMA3, True, "llama-bpe"), (LLAMA3, False, "dbrx"), (QWEN2, False, "qwen2"), (GPT4O, False, "gpt-4o"),
     (TEKKEN, True, "tekken")],
)  # fmt: skip
def test_how_text_is_split_has_a_name(pattern: str, ignore_merges: bool, name: str) -> None:
    assert read_vocabulary(split_by(pattern, ignore_merges), VOCABULARY, []).split == name
    with pytest.raises(UserError, match=r"llama.cpp has no name known here for how this tokenizer splits text"):
        read_vocabulary(split_by(pattern + "|x", ignore_merges), VOCABULARY, [])


def in_ollama(text: str, messages: list[dict[str, str]]) -> str:
    """Write a chat as Ollama does from a Modelfile of one `range` with a case for each role."""
    body = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    system = re.search(r'SYSTEM """(.*?)"""', text, re.DOTALL)
    assert body
    cases = dict(re.findall(r'eq \.Role "(\w+)" }}(.*?)(?={{ else if|{{ end }}{{ end }})', body[1], re.DOTALL))
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system[1]}, *messages]
    end = body[1].rpartition("{{ end }}{{ end }}")[2]
    return "".join(cases[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + end


@pytest.mark.parametrize("with_system", [False, True])
def test_the_modelfile_writes_chats_as_the_template_does(with_system: bool) -> None:
    tokenizer = merging_tokenizer()
    text = modelfile("model.gguf", tokenizer, [301], 2048)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "?"}]
    chat = [{"role": "system", "content": "Rhyme."}, *chat] if with_system else chat
    expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert in_ollama(text, chat) == expected
    assert in_ollama(text, chat[:-1]) != expected
    assert text.startswith("FROM ./model.gguf\nPARAMETER num_ctx 2048\n")
    assert 'PARAMETER stop "</s>"' in text


def test_a_template_of_another_kind_is_left_to_ollama() -> None:
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    text = modelfile("model.gguf", tokenizer, [301], 2048)
    assert "TEMPLATE" not in text
    assert "Ollama chooses one" in text


def test_an_export_of_a_run_directory_goes_into_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"recipe": {"teacher": str(tmp_path / "teacher"), "seed": 3}}))
    with pytest.raises(UserError, match="has no student yet"):
        minitron.export(run, format="gguf")
    make_exported(run / "student", "llama")
    done = minitron.export(run, quantize="q8_0", format="gguf")
    assert done.file == run / "gguf-q8_0" / "run-q8_0.gguf"
    with pytest.raises(UserError, match="--overwrite"):
        minitron.export(run, quantize="q8_0", format="gguf")


def test_llama_cpp_is_accepted_where_its_table_of_engines_accepts() -> None:
    """Every family that `engines` lists has an architecture, and no other has."""
    from minitron.model.engines import LLAMA_CPP

    assert architectures.ARCHITECTURES.keys() == LLAMA_CPP.families
    assert require_architecture(source("llama")).name == "llama"


def source(variant: str, **changes: Any) -> Source:
    config = make_config(variant, **changes).to_dict()
    return Source(minitron.Arch.from_config(config), config)


def test_a_changed_folder_is_another_model(tmp_path: Path, exported: Callable[[str], tuple[Path, Path]]) -> None:
    folder, path = exported("gpt2")
    other = copy_of(folder, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[0, 0] += 1
    model.save_pretrained(other)
    changed, before = tensors_of(minitron.export(other, tmp_path / "out", format="gguf").file), tensors_of(path)
    assert [name for name in before if not np.array_equal(before[name], changed[name])] == ["blk.0.attn_qkv.weight"]
