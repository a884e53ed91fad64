"""LLaVA-style image-text data: both file forms, tags, sampling, determinism, everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prts_core.config.sampling import choose
from prts_core.data.llava import LlavaDataset
from prts_core.io.errors import ConfigError, DataError, PrtsError


def ask(question: str = "What is it?", answer: str = "A cup.", **more: object) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, size in enumerate([(8, 6), (12, 10)]):  # width, height
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", size, (40 * number, 9, 200)).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path


def written(root: Path, entries: list, name: str = "data.json") -> Path:
    path = root / name
    lines = name.endswith("l")
    path.write_text("\n".join(json.dumps(e) for e in entries) + "\n\n" if lines else json.dumps(entries))
    return path


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_turns_and_images(root: Path, name: str) -> None:
    data = LlavaDataset.open(
        written(
            root,
            [
                ask("<image>\nWhat is it?", image="pictures/0.png"),
                ask("<image> and <image>: which is larger?", "The second.", image=["pictures/0.png", "pictures/1.png"]),
                ask("No picture.", "None."),
            ],
            name,
        )
    )
    assert len(data) == 3 and data.skipped == {}
    first = data[0]
    assert first.turns == (("user", "<image>\nWhat is it?"), ("assistant", "A cup."))
    assert [image.shape for image in data[1].images] == [(6, 8, 3), (10, 12, 3)]
    assert first.images[0].dtype == np.uint8 and (first.images[0] == (0, 9, 200)).all()
    assert data[2].images == [] and data.image_sizes(1) == [(6, 8), (10, 12)]


def test_what_cannot_be_taken_is_counted(root: Path) -> None:
    entries = [
        ask("<video> What happens?", video="a.mp4"),
        ask("What to do?", "<action>"),
        ask(num_tokens=900),
        ask(num_tokens=20),
        ask(),
    ]
    data = LlavaDataset.open(written(root, entries), max_tokens=512)
    assert len(data) == 2 and data.skipped == {"action": 1, "num_tokens": 1, "video": 1}
    with pytest.raises(DataError, match=r"no sample that can be used.*2 left out: video"):
        LlavaDataset.open(written(root, entries[:1] * 2))


def test_a_system_turn_and_several_rounds(root: Path) -> None:
    rounds = ask()["conversations"]
    data = LlavaDataset.open(
        written(root, [{"conversations": [{"from": "system", "value": "Be short."}, *rounds, *rounds]}])
    )
    assert [role for role, _ in data[0].turns] == ["system", "user", "assistant", "user", "assistant"]


def test_strategies() -> None:
    assert choose(10, "all", 0) == list(range(10))
    assert choose(10, "first:3", 0) == [0, 1, 2] and choose(10, "end:2", 0) == [8, 9]
    assert choose(10, "first:25%", 0) == [0, 1, 2] and choose(3, "end:99", 0) == [0, 1, 2]
    drawn = choose(1000, "random:10%", 5)
    assert len(drawn) == 100 and drawn == sorted(set(drawn)) == choose(1000, "random:100", 5) != choose(
        1000, "random:100", 6
    )
    for wrong in ("some", "first", "first:0", "first:-1", "random:1.5", "end:101%", "all:3", "random:x%"):
        with pytest.raises(ConfigError, match="sampling_strategy"):
            choose(10, wrong, 0)


def test_the_digest_follows_file_choice_and_images(root: Path) -> None:
    path = written(root, [ask("<image>?", image="pictures/0.png"), ask("again", "x")])
    digest = LlavaDataset.open(path).digest
    assert LlavaDataset.open(path).digest == digest
    assert LlavaDataset.open(path, strategy="first:1").digest != digest
    Image.new("RGB", (64, 64), (1, 2, 3)).save(root / "pictures/0.png")
    assert LlavaDataset.open(path).digest != digest


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"text": "x"}, ["entry 1", "conversations"]),
        ("x", ["entry 1", "conversations"]),
        (ask(image="pictures/0.png"), ["0 tags", "1 images"]),
        (ask("<image><image>", image="pictures/0.png"), ["2 tags", "1 images"]),
        (ask("<image>", image="../secret.png"), ["../secret.png", "inside vision_base_path"]),
        (ask("<image>", image="/etc/passwd"), ["/etc/passwd", "inside vision_base_path"]),
        (ask("<image>", image="pictures/out.png"), ["pictures/out.png", "links included"]),
        (ask("<image>", image="pictures/9.png"), ["1 images", "missing", "pictures/9.png"]),
        (ask("<image>", image=[3]), ["entry 1, image", "list of paths"]),
        (ask("a <|image_pad|> b"), ["<|image_pad|>", "control tokens"]),
        (ask(""), ["conversations[0]", "some text"]),
        (ask(num_tokens="many"), ["num_tokens", "whole number"]),
        ({"conversations": []}, ["answer of the assistant"]),
        ({"conversations": ask()["conversations"][:1]}, ["answer of the assistant"]),
        ({"conversations": ask()["conversations"][::-1]}, ["conversations[0]", "turns alternate"]),
        ({"conversations": [{"from": "dog", "value": "w"}]}, ["conversations[0]", "dog"]),
    ],
)
def test_malformed_entries_are_named(root: Path, entry: object, words: list[str]) -> None:
    (root.parent / "outside.png").write_bytes(b"x")
    (root / "pictures/out.png").symlink_to(root.parent / "outside.png")
    path = written(root, [ask(), entry])
    with pytest.raises(DataError) as told:
        LlavaDataset.open(path)
    assert all(word in str(told.value) for word in [*words, str(path)]), str(told.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"conversations": [}\n', "line 1"),
        ("a.json", '{"a": 1}', "one list"),
        ("a.json", "[", "not valid JSON"),
        ("a.txt", "", "json or jsonl"),
        ("b.jsonl", None, "missing"),
        ("a.jsonl", b"\xff\xfe{}", "UTF-8"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes | None, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PrtsError, match=words):
        LlavaDataset.open(path)
    with pytest.raises(DataError, match="vision_base_path"):
        LlavaDataset.open(path, tmp_path / "nowhere")


def test_a_damaged_image_is_named_when_it_is_read(root: Path) -> None:
    (root / "pictures/0.png").write_bytes(b"no image")
    data = LlavaDataset.open(written(root, [ask("<image>", image="pictures/0.png")], "d.jsonl"))
    with pytest.raises(DataError, match=r"pictures/0\.png.*d\.jsonl, line 1"):
        data[0]
