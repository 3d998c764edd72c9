"""Windows of a text through two executors: alignment, bounded steps, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gristmill.backends.native import _native
from gristmill.errors import ModelError, UsageError
from gristmill.evaluate import compare, render, run
from gristmill.evaluate.measure import _shared_tokenizer
from gristmill.evaluate.metrics import Quality
from gristmill.evaluate.text import Text, builtin_text, read_text, windows
from gristmill.io.convert import prepare
from gristmill.io.tokenizer import Tokenizer
from gristmill.program.batch import GENERATED, PROMPT

VOCABULARY = 50


class FakeView:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.closed = False

    def truncate(self, length: int) -> None:
        self.length = length

    def close(self) -> None:
        self.closed = True

    def nbytes(self) -> int:
        return 0


class FakeExecutor:
    """Logits that depend on a token and on its position, so that a window cut or shifted wrongly shows."""

    program = None

    def __init__(self, seed: int, vocabulary: int = VOCABULARY) -> None:
        self.vocab_size = vocabulary
        self.seed = seed
        self.views: list[FakeView] = []
        self.most_rows = 0
        self.phases: set[int] = set()

    def allocate(self, capacity: int) -> FakeView:
        self.views.append(FakeView(capacity))
        return self.views[-1]

    def row(self, token: int, position: int) -> np.ndarray:
        random = np.random.default_rng((self.seed, token, position))
        return random.standard_normal(self.vocab_size).astype(np.float32)

    def step(self, batch, cancel=None) -> np.ndarray:
        (view,) = batch.views
        batch.check(self.vocab_size)
        self.phases |= set(batch.phases.tolist())
        rows = [self.row(int(batch.tokens[i]), view.length + int(i)) for i in batch.logit_rows]
        view.length += int(batch.lengths[0])
        self.most_rows = max(self.most_rows, len(rows))
        return np.stack(rows)

    def close(self) -> None:
        pass


def pieces(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(11)
    return [random.integers(0, VOCABULARY, n, dtype=np.int32) for n in lengths]


@pytest.mark.parametrize("bytes_at_once", [1 << 26, 4 * VOCABULARY * 35, 1])
def test_rows_are_aligned_however_a_window_is_cut(monkeypatch, bytes_at_once):
    monkeypatch.setattr("gristmill.evaluate.measure._LOGIT_BYTES", bytes_at_once)
    model, base = FakeExecutor(1), FakeExecutor(2)
    texts = pieces(70, 2, 33, *[5] * 5)
    found = compare(model, base, texts)
    expected = Quality()
    for piece in texts:
        targets = np.append(piece[1:], -1)
        theirs = np.stack([base.row(int(t), i) for i, t in enumerate(piece)])
        ours = np.stack([model.row(int(t), i) for i, t in enumerate(piece)])
        expected.add(theirs, ours, targets)
        expected.end_piece()
    wanted = expected.figures()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-12), key
    assert found["kl_mean_ci95"] is not None
    assert found["tokens"] == 130
    assert model.most_rows == {1 << 26: 70, 4 * VOCABULARY * 35: 32, 1: 16}[bytes_at_once]
    assert all(view.closed for view in model.views + base.views)


@pytest.mark.parametrize("phase", [PROMPT, GENERATED])
def test_the_text_is_read_in_one_phase(phase):
    model, base = FakeExecutor(1), FakeExecutor(2)
    compare(model, base, pieces(70, 2), phase=phase)
    assert model.phases == base.phases == {phase}


def test_base_and_model_are_not_symmetric():
    ours, theirs = FakeExecutor(1), FakeExecutor(2)
    one, other = compare(ours, theirs, pieces(9)), compare(theirs, ours, pieces(9))
    assert one["kl_mean"] != pytest.approx(other["kl_mean"], rel=1e-3)
    assert one["perplexity"] == pytest.approx(other["base_perplexity"])


def test_progress_ends_at_the_total():
    seen = []
    compare(
        FakeExecutor(1), FakeExecutor(1), pieces(4, 4), lambda label, done, total: seen.append((done, total))
    )
    assert seen[-1] == (8, 8)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_other_vocabularies_are_refused():
    with pytest.raises(ModelError, match="50 logits and the base 51"):
        compare(FakeExecutor(1), FakeExecutor(1, 51), pieces(4))


def test_views_are_closed_after_a_failure():
    model, base = FakeExecutor(1), FakeExecutor(2)
    model.step = lambda batch, cancel=None: (_ for _ in ()).throw(UsageError("no"))
    with pytest.raises(UsageError):
        compare(model, base, pieces(4))
    assert all(view.closed for view in model.views + base.views)


# ---- text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(prepare("smollm2"))


def test_windows_are_the_text_from_its_beginning(tokenizer):
    text = builtin_text()
    cut = windows(tokenizer, text, 1000, 128)
    assert [len(piece) for piece in cut] == [128] * 7 + [104]
    whole = tokenizer.encode(text.content[:20_000], add_special=False)
    assert np.concatenate(cut).tolist() == whole[:1000]


def test_a_begin_token_opens_every_window(tokenizer):
    class WithBegin:
        bos_token_id = 7

        def encode(self, text: str, add_special: bool = True) -> list[int]:
            return [7] * add_special + tokenizer.encode(text, add_special=False)

    plain = tokenizer.encode(builtin_text().content[:2000], add_special=False)
    cut = windows(WithBegin(), builtin_text(), 100, 40)
    assert [len(piece) for piece in cut] == [40, 40, 20]
    assert [piece[0] for piece in cut] == [7, 7, 7]
    assert [int(t) for piece in cut for t in piece[1:]] == plain[:97]


def test_a_single_last_token_is_left_out(tokenizer):
    assert [len(piece) for piece in windows(tokenizer, builtin_text(), 65, 32)] == [32, 32]
    with pytest.raises(ModelError, match="no more than one token"):
        windows(tokenizer, Text("short", "a"), 100, 32)


def test_a_short_text_gives_what_it_has(tokenizer):
    text = Text("short", "The mill turns while the water runs.")
    (piece,) = windows(tokenizer, text, 4096, 512)
    assert tokenizer.decode(piece.tolist()) == text.content


def test_unreadable_texts_are_refused(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "blank").write_text(" \n")
    (tmp_path / "good").write_text("čas")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_text(tmp_path / "latin")
    with pytest.raises(UsageError, match="is empty"):
        read_text(tmp_path / "blank")
    with pytest.raises(UsageError, match="cannot read the text"):
        read_text(tmp_path / "missing")
    assert read_text(tmp_path / "good").name == "good"


def test_other_tokenizers_are_refused(tokenizer):
    class Other:
        def encode(self, text: str) -> list[int]:
            return [1, 2, 3]

    assert _shared_tokenizer(tokenizer, tokenizer, "some text") is tokenizer
    with pytest.raises(ModelError, match="different tokenizers"):
        _shared_tokenizer(Other(), tokenizer, "some text")


# ---- the demo model

FIGURES = {"tokens", "text", "kl_mean", "kl_p99", "top1_agreement", "perplexity", "base_perplexity"}


def test_a_model_does_not_diverge_from_itself():
    result = run(
        "smollm2",
        tokens=48,
        window=32,
        activations="exact",
        kv_dtype="f32",
        base_weights="stored",
    )
    assert result.keys() >= FIGURES
    assert result["kl_max"] == 0.0
    assert result["top1_agreement"] == 1.0
    assert result["perplexity"] == result["base_perplexity"]
    assert result["tokens"] == 48
    assert (result["window"], result["windows"]) == (32, 2)
    assert result["text"].startswith("pydoc_data.topics of CPython 3.")
    json.dumps(result)


def test_fast_activations_cost_a_little(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(builtin_text().content[5000:9000])
    result = run("smollm2", "smollm2", text=text, tokens=96, base_weights="stored")
    assert result["text"] == "text.txt"
    assert 0.0 < result["kl_mean"] < 0.02
    assert result["top1_agreement"] > 0.9
    assert result["perplexity"] == pytest.approx(result["base_perplexity"], rel=0.05)
    tiles = _native.default_level().startswith("amx")
    assert result["modes"]["arithmetic"] == ("int8 (prompts bf16)" if tiles else "int8")
    assert result["base_modes"]["arithmetic"] == "f32"
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(result))
    shown = console.export_text()
    assert f"{result['perplexity']:.4f}" in shown
    assert f"{100 * result['top1_agreement']:.2f} %" in shown
    assert result["kl_mean_ci95"] is None  # so short a text
    assert f"{result['perplexity_ratio']:.4f} (" not in shown
    console.print(render({**result, "kl_mean_ci95": [0.125, 0.25], "perplexity_ratio_ci95": [1.5, 2.0]}))
    shown = console.export_text()
    assert f"{result['kl_mean']:.3g} (0.125 to 0.25)" in shown
    assert f"{result['perplexity_ratio']:.4f} (1.5000 to 2.0000)" in shown


@pytest.mark.parametrize("wrong", [{"tokens": 1}, {"window": 1}, {"kv_dtype": "f8"}, {"activations": "slow"}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError):
        run("smollm2", base_weights="stored", **wrong)
