"""Where calibration tokens come from: windows, seeds, samples, disjointness, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from gristmill.calibrate.text import CalibrationText, Sequences, _topics
from gristmill.errors import UsageError
from gristmill.evaluate.text import Text, builtin_text, read_text
from gristmill.io.convert import prepare
from gristmill.io.tokenizer import Tokenizer
from tests.kits import files


class Characters:
    """A token per character, behind begin token 1 if there is one."""

    def __init__(self, begins: bool = False) -> None:
        self.bos_token_id = 1 if begins else None
        self.encoded = 0

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        self.encoded += len(text)
        return ([1] if add_special and self.bos_token_id else []) + [ord(c) for c in text]


DIGITS = Text("digits", "".join(chr(0x4E00 + i) for i in range(1000)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, of a context of 128 tokens."""
    path = tmp_path_factory.mktemp("calibrate")
    of = files.config("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRISTMILL_CACHE", str(path / "cache"))
        return prepare(files.write_gguf(path / "tiny.gguf", of, files.weights(of), {})[0])


@pytest.mark.parametrize("begins", [False, True])
def test_windows_are_whole_and_do_not_overlap(begins: bool) -> None:
    wanted = CalibrationText(tokens=300, sequence=33)
    assert (wanted.count, wanted.length) == (10, 33)
    found = wanted.cut(Characters(begins), DIGITS)  # type: ignore[arg-type]
    assert (found.name, found.tokens, len(found.ids)) == ("digits", 330, 10)
    bodies = [ids[1:] if begins else ids for ids in found.ids]
    assert all((ids[0] == 1) == begins and len(ids) == 33 for ids in found.ids)
    for body in bodies:
        assert list(body) == list(range(body[0], body[0] + len(body)))
    assert len({token for body in bodies for token in body}) == sum(map(len, bodies))


def test_the_seed_chooses_the_windows() -> None:
    one, again, other = (
        CalibrationText(tokens=90, sequence=30, seed=seed).cut(Characters(), DIGITS)  # type: ignore[arg-type]
        for seed in (0, 0, 1)
    )
    assert one == again
    assert one.ids != other.ids
    assert one.report() == {
        "text": "digits",
        "tokens": 90,
        "sequences": 3,
        "ids_sha256": again.report()["ids_sha256"],
    }
    assert one.report() != other.report()
    # The cuts between sequences count, too.
    assert Sequences("x", ((1, 2), (3,))).report() != Sequences("x", ((1,), (2, 3))).report()


def test_only_what_is_needed_of_a_long_text_is_read() -> None:
    tokenizer = Characters()
    CalibrationText(tokens=10, sequence=10).cut(tokenizer, Text("long", "x" * 10**6))  # type: ignore[arg-type]
    assert tokenizer.encoded == 640
    exact = CalibrationText(tokens=1000, sequence=100).cut(Characters(), DIGITS)  # type: ignore[arg-type]
    assert exact.tokens == 1000


def test_a_text_that_is_too_short_says_what_it_has() -> None:
    with pytest.raises(UsageError, match="digits has only 1000 tokens: 11 calibration sequences of 100 need"):
        CalibrationText(tokens=1001, sequence=100).cut(Characters(), DIGITS)  # type: ignore[arg-type]


def test_topics_are_disjoint_from_the_half_that_evaluation_starts_with() -> None:
    whole, ours = builtin_text(), _topics()
    assert ours.name.startswith("second half of pydoc_data.topics of CPython")
    first = whole.content[: len(whole.content) // 2]
    paragraphs = ours.content.split("\n\n")
    words = [" ".join(p.split()) for p in paragraphs]
    assert not {" ".join(p.split()) for p in first.split("\n\n")[:-1]} & set(words)
    assert len(set(words)) == len(words)
    assert len(ours.content) > len(whole.content) / 4
    assert all(p in whole.content[len(first) :] for p in paragraphs)


def test_topics_and_files_for_a_model(model: Path, tmp_path: Path) -> None:
    wanted = CalibrationText(tokens=200, sequence=64)
    found = wanted.read(model)
    assert found == wanted.cut(Tokenizer.load(model), _topics())
    path = tmp_path / "mine.txt"
    path.write_text("The north wind and the sun. " * 60, encoding="utf-8")
    own = CalibrationText(path, tokens=200, sequence=64).read(model)
    assert own == wanted.cut(Tokenizer.load(model), read_text(path))
    assert own.name == "mine.txt"


def test_a_model_samples_its_own_text(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    wanted = CalibrationText("self", tokens=20 * 24, sequence=24, seed=5)
    found = wanted.read(model, threads=1, progress=lambda label, done, total: seen.append((done, total)))
    assert {len(ids) for ids in found.ids} == {24}
    assert len({ids[8:] for ids in found.ids}) == len(found.ids) == 20
    assert found.name == f"samples of {model.name}, seed 5"
    assert seen[-1] == (480, 480)
    assert found == wanted.read(model, threads=2)
    assert found.ids != CalibrationText("self", tokens=480, sequence=24, seed=6).read(model).ids
    tokenizer = Tokenizer.load(model)
    assert not {ids[0] for ids in found.ids} & tokenizer.special_ids
    # The first samples are the same however many follow.
    assert found.ids[:3] == CalibrationText("self", tokens=72, sequence=24, seed=5).read(model).ids


def test_what_cannot_be_read_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(UsageError, match="not UTF-8"):
        CalibrationText(tmp_path / "latin1.txt").read(model)
    with pytest.raises(UsageError, match=r"missing\.txt"):
        CalibrationText(tmp_path / "missing.txt").read(model)
    for source in ("self", "topics"):
        with pytest.raises(UsageError, match="129 tokens are beyond the model's 128"):
            CalibrationText(source, sequence=129).read(model)
    for wrong in ({"tokens": 1}, {"sequence": 1}, {"seed": -1}):
        with pytest.raises(UsageError, match=str(next(iter(wrong.values())))):
            CalibrationText(**wrong)
