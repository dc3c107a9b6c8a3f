# SPDX-License-Identifier: Apache-2.0
"""What the command line makes of files, folders and their columns."""

import io
import struct
import wave
from importlib.util import find_spec

import datasets
import numpy as np
import pytest
import torch
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Image
from PIL import Image as Picture
from transformers import (
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

from benchmarks.models.entries import ENTRIES
from hfkdq.cli.audio import decodable, samples_of
from hfkdq.cli.data import CALIBRATION, EVALUATION, load_rows, load_split
from hfkdq.cli.inputs import Reader
from hfkdq.cli.labels import label_reader
from hfkdq.cli.media import to_mode

from . import tiny

NAMES = ["red", "green", "blue"]
TEXTS = ["w1 w2", "w3", "w4 w5 w6 w7"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def bert(**kwargs):
    return tiny.bert(id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)}, **kwargs)


def texts_of(where, preferred=CALIBRATION, samples=None):
    return load_rows(str(where), preferred, samples)[0]["text"][:]


def saved(rows, path):
    path.parent.mkdir(exist_ok=True)
    Dataset.from_dict(rows).to_parquet(path)
    return path


def reader(model=None, columns=None, processor=None, length=None):
    return Reader(model or bert(), processor or tiny.tokenizer(), columns, length)


def batches(reader, where):
    return list(reader.batches(str(where), CALIBRATION, 64))


def test_a_folder_has_splits_by_the_names_of_its_files(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation", "test"):
        saved({"text": [name]}, tmp_path / "data" / f"{name}.parquet")
    assert len(texts_of(tmp_path / "data")) == 2
    assert texts_of(tmp_path / "data", EVALUATION) == ["validation"]
    assert texts_of(f"{tmp_path / 'data'}:test") == ["test"]
    with pytest.raises(ValueError, match="no split 'dev'; it has train, validation, test"):
        texts_of(f"{tmp_path / 'data'}:dev")


def test_training_rows_of_several_splits_do_not_evaluate(tmp_path):
    DatasetDict(train=Dataset.from_dict({"text": ["a"]}), extra=Dataset.from_dict({"text": ["b"]})).save_to_disk(
        tmp_path / "saved"
    )
    assert texts_of(tmp_path / "saved") == ["a"]
    with pytest.raises(ValueError, match="train, extra and none of validation, test"):
        texts_of(tmp_path / "saved", EVALUATION)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_file_is_read_alone(tmp_path, monkeypatch, suffix):
    rows = Dataset.from_dict({"text": ["a", "b"]})
    {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[suffix](tmp_path / f"rows.{suffix}")
    Dataset.from_dict({"text": ["other"]}).to_csv(tmp_path / "test.csv")
    assert texts_of(tmp_path / f"rows.{suffix}", EVALUATION) == ["a", "b"]
    monkeypatch.chdir(tmp_path)
    assert texts_of(f"rows.{suffix}") == ["a", "b"]


def test_samples_are_drawn_from_all_rows_and_always_the_same(tmp_path):
    path = saved({"text": [str(i) for i in range(1000)]}, tmp_path / "rows.parquet")
    drawn = texts_of(path, samples=50)
    assert len(drawn) == 50
    assert max(map(int, drawn)) > 500
    assert drawn == texts_of(path, samples=50)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nothing\.csv"):
        texts_of(tmp_path / "nothing.csv")
    with pytest.raises(ValueError, match="DATA:CONFIGURATION:SPLIT"):
        texts_of("a:b:c:d")


def test_texts_become_what_the_tokenizer_makes_of_them(tmp_path):
    path = saved({"text": TEXTS, "id": [1, 2, 3], "label": NAMES}, tmp_path / "rows.parquet")
    (batch,) = batches(reader(), path)
    expected = tiny.tokenizer()(TEXTS, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    torch.testing.assert_close(batch["input_ids"], expected["input_ids"])
    torch.testing.assert_close(batch["attention_mask"], expected["attention_mask"])


def test_texts_are_as_long_as_positions_that_begin_behind_padding_allow(tmp_path):
    config = RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=18, pad_token_id=1,
    )  # fmt: skip
    path = saved({"text": ["w9 " * 100]}, tmp_path / "rows.parquet")
    (batch,) = batches(reader(RobertaForSequenceClassification(config), processor=tiny.tokenizer(10**30)), path)
    assert batch["input_ids"].shape[1] == 16


def test_two_columns_are_pairs_and_long_texts_are_cut(tmp_path):
    path = saved({"a": TEXTS, "b": ["w9 " * 100] * 3, "c": TEXTS}, tmp_path / "rows.parquet")
    (batch,) = batches(reader(columns=["c", "b"]), path)
    expected = tiny.tokenizer()(TEXTS, ["w9 " * 100] * 3, truncation=True, padding=True, return_tensors="pt")
    torch.testing.assert_close(batch["input_ids"], expected["input_ids"])
    assert batch["input_ids"].shape[1] == 32  # of the tokenizer
    assert batches(reader(columns=["b"], length=7), path)[0]["input_ids"].shape[1] == 7
    with pytest.raises(ValueError, match=r"3 of them in a \(string\), b \(string\), c \(string\).*--text-columns"):
        batches(reader(), path)
    with pytest.raises(ValueError, match="--text-columns d: no column of strings"):
        batches(reader(columns=["d"]), path)


def test_tokens_are_taken_as_they_are(tmp_path):
    path = saved(
        {"input_ids": [[2, 5, 3], [2, 3]], "attention_mask": [[1] * 3, [1] * 2], "note": ["x", "y"]},
        tmp_path / "rows.parquet",
    )
    (batch,) = batches(reader(), path)
    assert batch["input_ids"].tolist() == [[2, 5, 3], [2, 3, 0]]
    assert set(batch) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("channels", [1, 3])
def test_images_become_pixels_of_as_many_channels_as_the_model_has(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 10, 3), dtype=np.uint8)
    rows = Dataset.from_dict({"picture": [Picture.fromarray(image) for image in pixels]}).cast_column(
        "picture", Image()
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    model = tiny.vit()
    model.config.num_channels = channels
    processor = ViTImageProcessor(
        size={"height": 12, "width": 10}, image_mean=[0.5] * channels, image_std=[0.25] * channels
    )
    (batch,) = batches(Reader(model, processor, None, None), tmp_path / "rows.parquet")
    images = (
        pixels
        if channels == 3
        else np.stack([np.asarray(Picture.fromarray(p).convert("L")) for p in pixels])[..., None]
    )
    expected = (images.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(batch["pixel_values"].numpy(), expected, atol=1e-5)


def wav(samples, rate, channels=1):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((np.asarray(samples) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def test_sounds_are_brought_to_the_rate_of_the_model_and_mixed_down():
    tone = np.sin(2 * np.pi * 440 * np.arange(800) / 8000)
    same = samples_of({"bytes": wav(tone, 8000), "path": None}, 8000)
    np.testing.assert_allclose(same, tone, atol=1e-4)
    twice = samples_of({"bytes": wav(tone, 8000), "path": None}, 16000)
    expected = np.sin(2 * np.pi * 440 * np.arange(1600) / 16000)
    np.testing.assert_allclose(twice[200:-200], expected[200:-200], atol=0.01)
    both = samples_of({"bytes": wav(np.stack([tone, -tone], 1), 8000, 2), "path": None}, 8000)
    np.testing.assert_allclose(both, np.zeros(800), atol=1e-4)
    with pytest.raises(ValueError, match=r"no plain WAV.*torchcodec"):
        samples_of({"bytes": b"OggS", "path": None}, 8000)


@pytest.mark.skipif(find_spec("torchcodec") is not None, reason="torchcodec reads sounds of all kinds")
def test_sounds_that_nothing_reads_are_named_before_one_is_read():
    deep = bytearray(wav(TONE, 16000))
    deep[32:36] = struct.pack("<HH", 3, 24)  # bytes of a frame, bits of a sample
    for content, words in ((b"OggS", "no plain WAV file"), (bytes(deep), "WAV files of 24 bits")):
        rows = Dataset.from_dict({"sound": [{"bytes": one, "path": None} for one in (wav(TONE, 16000), content)]})
        with pytest.raises(ValueError, match=f"^Row 1: .*{words}"):
            decodable(rows.cast_column("sound", Audio(decode=False)), "sound", 16000)


def test_deep_images_are_scaled_to_eight_bits():
    deep = np.array([[0, 257 * 7], [257 * 128, 65535]], np.uint16)
    for picture in (Picture.fromarray(deep), Picture.fromarray(deep.astype(np.int32))):
        assert np.asarray(to_mode(picture, "RGB"))[..., 1].tolist() == [[0, 7], [128, 255]]
    dark = deep.clip(0, 3 * 257 - 1)  # is dark among others, whatever its largest value
    assert np.asarray(to_mode(Picture.fromarray(dark), "L")).tolist() == [[0, 2], [2, 2]]
    assert np.asarray(to_mode(Picture.fromarray(deep.clip(0, 255).astype(np.int32)), "L")).tolist() == [
        [0, 255],
        [255, 255],
    ]
    with pytest.raises(ValueError, match="floats, of which nothing says the range"):
        to_mode(Picture.fromarray(deep.astype(np.float32)), "L")


def noise(kind):
    file = io.BytesIO()
    Picture.effect_noise((64, 64), 90).save(file, kind)
    return file.getvalue()


TONE = np.sin(np.arange(1600) / 9)


@pytest.mark.parametrize(
    ("feature", "content", "words"),
    [
        (Image, b"", r"cannot identify image file"),
        (Image, b"no image", r"cannot identify image file"),
        (Image, noise("png")[:700], r"truncated"),
        (Image, noise("jpeg")[:700], r"truncated"),
        (Audio, b"", r"the file is empty"),
        (Audio, wav(TONE, 1), r"it says 1 samples a second, and sounds have 1,000 and more"),
        (Audio, wav([], 16000), r"it has no samples"),
        (Audio, wav(TONE, 16000)[:20], r"EOFError"),
    ],
    ids=["no bytes", "a text", "half a PNG", "half a JPEG", "no sound", "1 Hz", "no samples", "half a header"],
)
def test_a_damaged_image_or_sound_is_named_with_its_row(tmp_path, feature, content, words):
    good = noise("png") if feature is Image else wav(TONE, 16000)
    rows = Dataset.from_dict({"file": [{"bytes": b, "path": None} for b in (good, content, good)], "label": NAMES})
    rows.cast_column("file", feature(decode=False)).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=rf"The file in row 1 of 3 rows of .*rows.parquet cannot be read.*{words}"):
        load_rows(str(tmp_path / "rows.parquet"), CALIBRATION, None)


def test_images_that_were_saved_undecoded_are_decoded(tmp_path):
    rows = Dataset.from_dict({"image": [{"bytes": noise("gif"), "path": None}] * 2, "label": NAMES[:2]})
    rows.cast_column("image", Image(decode=False)).to_parquet(tmp_path / "rows.parquet")
    (batch,) = batches(reader(tiny.vit(channels=3), processor=ViTImageProcessor()), tmp_path / "rows.parquet")
    assert batch["pixel_values"].shape[0] == 2


def test_an_image_that_is_missing_is_refused_where_it_is_read_alone(tmp_path):
    rows = Dataset.from_dict({"image": [Picture.new("L", (8, 8)), None], "label": NAMES[:2], "text": TEXTS[:2]})
    rows.to_parquet(tmp_path / "rows.parquet")
    assert len(batches(reader(), tmp_path / "rows.parquet")[0]["input_ids"]) == 2
    with pytest.raises(ValueError, match=r"lack a value of image in row 1 \(1 of 2 rows\)"):
        batches(reader(tiny.vit(), processor=ViTImageProcessor()), tmp_path / "rows.parquet")


def test_batches_of_sounds_have_the_mask_that_their_extractor_makes(tmp_path):
    tones = [np.sin(np.arange(length) / 9) for length in (1600, 1200)]
    rows = Dataset.from_dict(
        {"sound": [{"bytes": wav(t, 16000), "path": None} for t in tones], "label": ["blue", "red"]}
    )
    rows.cast_column("sound", Audio(decode=False)).to_parquet(tmp_path / "rows.parquet")
    names = dict(id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})
    model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**{**tiny.wav2vec2_config().to_diff_dict(), **names}))
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    (batch,) = batches(Reader(model, extractor, None, None), tmp_path / "rows.parquet")
    assert batch["attention_mask"].sum(1).tolist() == [1600, 1200]
    normal = [(t - t.mean()) / t.std() for t in tones]
    np.testing.assert_allclose(batch["input_values"][0].numpy(), normal[0], atol=1e-3)
    np.testing.assert_allclose(batch["input_values"][1].numpy(), np.pad(normal[1], (0, 400)), atol=1e-3)
    assert extractor.return_attention_mask  # it is saved with the file
    given = Reader(model, extractor, None, None).evaluation(str(tmp_path / "rows.parquet"), EVALUATION, None)
    assert [row["labels"] for row in given["eval_dataset"]] == [2, 0]
    assert given["data_collator"](list(given["eval_dataset"]))["labels"].tolist() == [2, 0]


def labels(rows, names=NAMES, feature=None):
    rows = Dataset.from_dict({"label": rows})
    if feature is not None:
        rows = rows.cast_column("label", feature)
    config = tiny.bert_config(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    return label_reader(rows, config, "the rows")(rows[:])


def test_names_of_labels_are_those_of_the_model(capsys):
    assert labels(["blue", "red"]) == [2, 0]
    assert labels([0, 2]) == labels([0.0, 2.0]) == [0, 2]
    assert labels([0, 1], feature=ClassLabel(names=["blue", "red"])) == [2, 0]
    assert labels([3, 0], feature=ClassLabel(names=["blue", "green", "purple", "red"])) == [0, 2]
    assert not capsys.readouterr().err
    assert labels([0, 1], feature=ClassLabel(names=["rouge", "vert", "bleu"])) == [0, 1]
    assert "rouge = red, vert = green" in capsys.readouterr().err


def test_labels_that_the_model_does_not_know_are_refused():
    with pytest.raises(ValueError, match="label 'pink', which the model does not know; its label2id has red, green"):
        labels(["blue", "pink"])
    with pytest.raises(ValueError, match="label 'pink', which the model does not know"):  # not green, nor blue red
        labels([0, 1], feature=ClassLabel(names=["blue", "pink"]))
    with pytest.raises(ValueError, match=r"label -1; the model has the classes 0 to 2.*DATA:validation"):
        labels([-1, 0])
    with pytest.raises(ValueError, match=r"label 0\.5"):
        labels([0.5, 1.0])
    with pytest.raises(ValueError, match=r"label 7; the model has the classes 0 to 2 \(red, green, blue\)\.$"):
        labels([7, 0])
    with pytest.raises(ValueError, match=r"lack a value of label in row 1 \(1 of 3 rows\)"):
        labels(["blue", None, "red"])
    with pytest.raises(ValueError, match=r"labels of several kinds or parts in label: label \(List\)"):
        labels([[0], [1]])
    sorted_by_name = tiny.bert_config(label2id={"blue": 2, "green": 1, "red": 0}, id2label=dict(enumerate(NAMES)))
    with pytest.raises(ValueError, match=r"classes 0 to 2 \(red, green, blue\)"):  # as configurations are saved
        label_reader(Dataset.from_dict({"label": [7]}), sorted_by_name, "the rows")
    with pytest.raises(ValueError, match="no column label or labels; their columns are text"):
        label_reader(Dataset.from_dict({"text": TEXTS}), tiny.bert_config(), "the rows")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.CSV", b"text\nw1\n", r"rows.CSV has an ending that says nothing of what it is. Files of data are .parquet"),
        ("rows", b"text\nw1\n", r"rows has an ending that says nothing"),
        ("a folder/rows.xlsx", b"PK", r"rows.xlsx has an ending that says nothing"),
        ("rows.csv", "text\né\n".encode("latin-1"), r"rows.csv could not be read as data \(UnicodeDecodeError: .*\. Save it in UTF-8"),
        ("rows.csv", b"text,text,label\nw1,w2,0\n", r"two columns text, of which the second is read as text.1"),
        ("rows.csv", b"text,label,label\nw1,0,1\n", r"two columns label, of which the second is read as label.1"),
        ("rows.csv", b"text;label\nw1;0\n", r"rows.csv has one column, 'text;label'. Columns are separated by commas, in a .tsv file by tabs"),
        ("rows.csv", b"text, label\nw1,0\n", r"their columns are text, ' label'\."),
        ("rows.csv", b"text,label\nw1,0\nNA,1\n", r"lack a value of text in row 1 .* Of CSV files NA, None and null are read as no value"),
        ("rows.jsonl", b'{"text": "w1", "label": 0}\n{"text": "w2", "label": "a"}\n', r"labels of several kinds or parts in label"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_what_they_seem_are_refused(tmp_path, name, content, words):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        reader().evaluation(str(path), (*EVALUATION, "train"), None)


def test_a_row_is_told_by_its_number_in_the_file(tmp_path):
    path = saved({"text": [*TEXTS * 9, None], "label": [0] * 28}, tmp_path / "rows.parquet")
    for rows, _ in load_split(str(path), None, None):
        if None in rows["text"]:
            with pytest.raises(ValueError, match=r"lack a value of text in row 27 \(1 of "):
                reader().encoder(rows)
            break
    else:
        pytest.fail("no split has the row")


def test_what_does_not_fit_is_named(tmp_path):
    path = saved({"text": TEXTS, "n": [1, 2, 3]}, tmp_path / "rows.parquet")
    for model, words in {
        tiny.vit(): r"one column of images \(datasets.Image\); there are 0 of them in text \(string\), n \(int64\)",
        tiny.t5(): "T5ForConditionalGeneration reads a column of texts and one of what it is to write",
    }.items():
        with pytest.raises(ValueError, match=words):
            batches(reader(model), path)
    with pytest.raises(ValueError, match=r"no tokenizer or processor that makes input_ids of the columns text"):
        batches(Reader(bert(), None, None, None), path)


def test_a_classifier_is_evaluated(tmp_path):
    path = saved({"text": TEXTS, "label": [0, 1, 2]}, tmp_path / "rows.parquet")
    given = reader().evaluation(str(path), EVALUATION, None)
    batch = given["data_collator"](list(given["eval_dataset"]))
    assert batch["labels"].tolist() == [0, 1, 2]
    assert batch["input_ids"].shape == (3, 6)


@pytest.mark.parametrize(
    ("family", "longest"),
    [("bert", 64), ("roberta", 63), ("opt", 64), ("gpt2", 64), ("whisper", 16), ("clip", 64), ("llama", None)],
)
def test_no_text_is_longer_than_the_positions_that_there_are(family, longest):
    model = ENTRIES[family].make()
    if longest is None:  # positions that are computed end nowhere
        assert Reader(model, None, None, 100).longest == 100
        return
    assert Reader(model, None, None, longest).longest == longest
    with pytest.raises(ValueError, match=f"more than the {longest} positions .* name {longest} at most"):
        Reader(model, None, None, longest + 1)
