"""The pure parts of the data recipe of the built-in model: no speech engine, no package of data is needed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
import shutil
import struct
import subprocess
import zipfile

import numpy as np
import pytest
from tokenizers import Tokenizer

from audioflamingo.hub import BUILT_IN_FOLDER
from recipes.nano.nano_data import (
    conversations,
    corpus,
    instruments,
    messages,
    midi,
    newcomers,
    normalise,
    packages,
    sounds,
    speech,
    splits,
    store,
    templates,
    text_sources,
    voices,
    words,
    writing,
)
from recipes.nano.nano_model import vocabulary
from recipes.nano.nano_model.training.clips import SETS


def make_clips(label: str, count: int = 3, text: str = "", original: str = "") -> list[messages.Clip]:
    return [
        messages.Clip(f"audio/{label}/{number}.flac", 1.0 + number, label, text, original)
        for number in range(count)
    ]


def make_maker(split: str = "train") -> conversations.Maker:
    by_label = {label: make_clips(label) for label in messages.read_labels()}
    by_label["speech"] = make_clips("speech", text="good morning", original="Good morning.")
    played = {label: make_clips(label) for label in instruments.INSTRUMENTS}
    return conversations.Maker(split, by_label, played, make_clips("silence"), "seed")


# normalisation


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (15, "fifteen"),
        (21, "twenty one"),
        (300, "three hundred"),
        (1234, "one thousand two hundred thirty four"),
    ],
)
def test_number_words(number, words):
    assert normalise.number_words(number) == words


@pytest.mark.parametrize(
    ("number", "words"), [(1, "first"), (12, "twelfth"), (20, "twentieth"), (31, "thirty first")]
)
def test_ordinal_words(number, words):
    assert normalise.ordinal_words(number) == words


@pytest.mark.parametrize(
    ("year", "words"),
    [
        (1984, "nineteen eighty four"),
        (1900, "nineteen hundred"),
        (2005, "two thousand five"),
        (1805, "eighteen oh five"),
    ],
)
def test_year_words(year, words):
    assert normalise.year_words(year) == words


def test_normalise_keeps_letters_and_inner_apostrophes_only():
    assert normalise.normalise("“Don't,” said Mr. O'Neil -- 'no!'") == "don't said mister o'neil no"


@pytest.mark.parametrize("text", ["in 1984", "naïve", "the U.S. army", "e.g. this", "a/b", "the NATO pact"])
def test_text_that_engines_read_differently_is_refused(text):
    assert not normalise.is_speakable(text)


def test_plain_sentences_are_speakable():
    assert normalise.is_speakable("I'm sure Mr. Darcy didn't say so.")


# grammar


def test_every_pattern_expands_to_speakable_sentences():
    lists = templates.read_lists()
    rng = random.Random(0)
    for category, pattern in templates.read_patterns():
        for _ in range(5):
            sentence = templates.expand(pattern, lists, rng)
            assert not re.search(r"[{}|()]", sentence), (category, pattern, sentence)
            assert normalise.is_speakable(sentence), (category, pattern, sentence)


def test_an_unknown_slot_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        templates.expand("a {nothing}", {}, random.Random(0))


def test_sentences_are_distinct_and_reproducible():
    first, second = (list(itertools.islice(templates.template_sentences(3), 300)) for _ in range(2))
    assert first == second
    per_pattern = [normalise.normalise(sentence) for _, sentence in first]
    assert len(set(per_pattern)) > 290


def test_articles_fit_the_word_that_follows():
    lists = {"x": ["apple", "the dog"]}
    said = {templates.expand("Have a {x}", lists, random.Random(seed)) for seed in range(9)}
    assert said == {"Have an apple", "Have the dog"}


# text sources


def test_sentences_are_cut_after_stops_but_not_after_titles():
    text = "Mr. Bennet replied that he had not. But it is, returned she."
    assert list(text_sources.split_sentences(text)) == [
        "Mr. Bennet replied that he had not.",
        "But it is, returned she.",
    ]


def test_strings_of_r_serialisation_are_found():
    blob = b"XX" + b"".join(
        b"\x00\x04\x00\x09" + struct.pack(">i", len(line)) + line for line in (b"It is", b"", b"a truth")
    )
    assert list(text_sources._r_strings(blob)) == ["It is", "", "a truth"]


# splits


def test_a_sentence_is_in_one_split_whatever_its_spelling():
    texts = [sentence for _, sentence in itertools.islice(templates.template_sentences(4), 2000)]
    for text in texts:
        split = splits.text_split(normalise.normalise(text))
        assert splits.text_split(normalise.normalise(text.upper() + "!!")) == split


def test_shares_of_the_splits():
    counts = dict.fromkeys(splits.SPLITS, 0)
    for number in range(20000):
        counts[splits.text_split(f"sentence {number}")] += 1
    # five standard deviations of a binomial count
    assert abs(counts["test"] - 400) < 100
    assert abs(counts["valid"] - 200) < 71


def test_held_out_voices_are_in_no_training_set():
    for engine, names in voices.TEST_VOICES.items():
        assert not set(names) & set(voices.TRAIN_VOICES[engine])
        drawn = {voices.random_voice(engine, random.Random(seed)).name for seed in range(200)}
        assert not any(held_out in name for held_out in names for name in drawn)


def test_recordings_share_no_group_between_splits():
    recordings = [
        sounds.Recording("animal", "p", "CC0-1.0", f"x/{name}-{number}.ogg")
        for name in "abcdefgh"
        for number in range(3)
    ]
    split = sounds.split_recordings(recordings)["animal"]
    assert len(split["train"]) + len(split["test"]) == len(recordings)
    assert split["test"]
    assert not {r.group for r in split["train"]} & {r.group for r in split["test"]}
    others = [sounds.Recording("animal", "q", "CC0-1.0", f"x/{n}.ogg", True) for n in "ijklmnopq"]
    longer = sounds.split_recordings(recordings + others)["animal"]
    assert longer["test"] == split["test"]
    assert longer["train"] == split["train"] + others
    held_out = split["test"][0]
    sibling = dataclasses.replace(held_out, path=held_out.path.replace("-", "-9"), is_training=True)
    assert sibling.group == held_out.group
    assert sounds.split_recordings([*recordings, sibling])["animal"] == split


def test_every_recording_has_a_class_and_a_licence():
    kinds = messages.read_classes()
    assert set(kinds.values()) == set(messages.read_labels())
    assert set(sounds.sound_labels()) | {"speech"} == set(kinds)
    rows = [
        row
        for name in ("recordings.tsv", *sounds.RECORDED_SETS.values())
        for row in messages.read_table(name)
    ]
    files = [row["files"] for row in rows]
    assert len(set(files)) == len(files)
    for row in rows:
        assert row["class"] in kinds
        assert row.get("heard") in (None, "", sounds.LEFT_OUT, *kinds)
        assert row["licence"]
        assert row["package"] in messages.RECIPE_DIR.joinpath("apt-data-packages.txt").read_text().split()


def test_training_prompts_leave_out_some_of_the_tests():
    train, test = messages.Prompts("train"), messages.Prompts("test")
    assert train.held_out
    assert set(test.patterns) == {*newcomers.KINDS, "transcribe"}
    for kind, texts in test.lists.items():
        assert set(train.lists[kind]) < set(texts)
        assert not {train.draw(kind, random.Random(n)) for n in range(300)} & train.held_out


def test_patterns_of_prompts_give_whole_sentences():
    prompts = messages.Prompts("train")
    assert set(prompts.patterns) <= {*prompts.lists, *newcomers.KINDS}
    for kind, patterns in prompts.patterns.items():
        for pattern in patterns:
            for n in range(30):
                text = messages.fill_pattern(pattern, random.Random(n))
                assert re.fullmatch(r"[A-Z]([^()|]|\(\w\))*[.?]", text)
                assert "  " not in text
                assert ("{label}" in text) == (kind == "compare")
                assert ("{word}" in text) == (kind == "word")


def test_some_wordings_of_training_are_worn_and_none_of_the_tests():
    train, test = messages.Prompts("train"), messages.Prompts("test")
    whole = {
        kind: {messages.fill_pattern(pattern, random.Random(n)) for pattern in patterns for n in range(3000)}
        for kind, patterns in (("gender", train.patterns["gender"]), ("word", test.patterns["word"]))
    }
    drawn = [train.draw("gender", random.Random(n)) for n in range(300)]
    assert 0.2 < sum(text not in whole["gender"] for text in drawn) / 300 < 0.45
    assert {test.draw("word", random.Random(n)) for n in range(300)} <= whole["word"]


def test_no_wording_of_a_held_out_pattern_is_drawn_for_training():
    train, test = messages.Prompts("train"), messages.Prompts("test")
    for kind in newcomers.KINDS:
        tested = {test.draw(kind, random.Random(n)) for n in range(100)}
        assert not any(train.is_allowed(text) for text in tested), kind
        assert not any(train.is_allowed(text.lower().rstrip("?.")) for text in tested), kind
        assert all(test.is_allowed(text) for text in tested), kind
        assert not tested & {train.draw(kind, random.Random(n)) for n in range(300)}, kind
    assert train.is_allowed("Is the speaker a man or a woman?")


def test_a_question_for_a_man_or_a_woman_is_never_asked_for_whether_somebody_speaks():
    train = messages.Prompts("train")
    asked = {train.draw("is_speech", random.Random(n)) for n in range(1000)}
    assert not [text for text in asked if re.search(r"\b(man or a|woman or a|male or)", text, re.IGNORECASE)]


@pytest.mark.parametrize(
    ("question", "is_open"),
    [
        ("What am I listening to?", True), ("What do you hear?", True), ("Write a caption for the clip.", True),
        ("What does this clip contain?", True), ("What is going on here?", True), ("What sound do you hear?", False),
        ("Classify the clip.", False), ("Describe the sound in the audio.", False), ("Which event is it?", False),
    ],
)  # fmt: skip
def test_open_questions_about_speech_want_its_words(question, is_open):
    assert bool(conversations.OPEN_WORDING.search(question)) == is_open


def test_what_a_worn_wording_must_hold_stays():
    worn = {messages.wear("Is {word} said in the clip?", random.Random(n)) for n in range(200)}
    assert len(worn) > 50
    assert all("{word}" in text for text in worn)
    assert any(text == text.lower() for text in worn)
    assert all(messages.wear("Gender?", random.Random(n)).strip() for n in range(50))


def test_a_mistyped_word_keeps_its_first_letter_and_short_words_and_fields_stay():
    found = {messages.mistype("recording", random.Random(n)) for n in range(300)}
    assert {"recroding", "recoding", "reccording"} <= found
    assert all(word[0] == "r" and 8 <= len(word) <= 10 for word in found)
    for word in ("it?", "man", "{word}", "said."):
        assert messages.mistype(word, random.Random(0)) == word


# plan of the speech


def test_plan_is_reproducible_and_stays_in_its_split():
    rows = [
        {
            "id": str(n),
            "split": splits.SPLITS[n % 3],
            "source": "austen",
            "original": f"S {n}.",
            "text": f"sentence number {n}",
        }
        for n in range(900)
    ]
    wanted = speech.SpeechSet("test_long", "hibari", "test", 0.2, kinds=("long",))
    clips = speech.plan_clips(wanted, rows)
    assert clips == speech.plan_clips(wanted, rows)
    assert {row["split"] for clip in clips for row in clip.rows} == {"test"}
    assert min(len(clip.rows) for clip in clips) > 3
    ids = [row["id"] for clip in clips for row in clip.rows]
    assert len(set(ids[:250])) == 250  # no sentence twice before each was said once


def test_single_words_are_those_said_alone_and_scraps_of_sentences():
    sentences = [
        {"source": "austen", "text": "the quick brown fox jumps"},
        {"source": "wordnet-definition", "text": "perambulation"},
    ]
    rows = words.word_rows(sentences, 400)
    assert rows == words.word_rows(sentences, 400)
    texts = {row["text"] for row in rows}
    assert {"brown fox", "q", "eleven", "quick"} <= texts
    assert "perambulation" not in texts
    assert max(len(text.split()) for text in texts) <= 3
    assert all(normalise.normalise(row["original"]) == row["text"] for row in rows)


def test_clips_end_where_the_words_end():
    """Engines put half a second of silence around a sentence; a model that always hears it finds no end without it."""
    quiet, words = np.full(8000, 1e-3, np.float32), np.ones(16000, np.float32)
    said = np.concatenate([quiet, words, quiet])
    leads, tails = [], []
    for seed in range(200):
        clip, used = speech.join_sentences([said], random.Random(seed))
        loud = np.flatnonzero(clip > 0.5)
        assert used == 1
        assert len(loud) == len(words)
        leads.append(loud[0] / 16000)
        tails.append((len(clip) - loud[-1]) / 16000)
    for edges in (leads, tails):
        assert max(edges) <= 0.53
        assert 0.1 < np.median(edges) < 0.2
        assert min(edges) < 0.03
    assert speech.without_quiet_ends(np.zeros(100, np.float32)).shape == (100,)


def test_joined_sentences_that_do_not_fit_are_left_out():
    waveforms = [np.ones(10 * 16000, np.float32)] * 4
    clip, used = speech.join_sentences(waveforms, random.Random(0))
    assert used == 2
    assert 20 * 16000 < len(clip) <= speech.MAX_CLIP_S * 16000


# shards


def test_a_shard_that_was_cut_off_is_made_again(tmp_path):
    shard = tmp_path / "000"

    def broken(folder):
        (folder / "half.flac").write_bytes(b"x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.make_shard(shard, broken)
    assert not shard.exists()
    assert list(store.read_shards(tmp_path, tmp_path)) == []
    assert store.make_shard(shard, lambda folder: [{"file": "a.flac"}])
    assert not store.make_shard(shard, broken)
    assert [row["path"] for row in store.read_shards(tmp_path, tmp_path)] == ["000/a.flac"]


def test_midi_file_is_well_formed():
    data = midi.midi_bytes([midi.Program(0, 40, 0.0)], [midi.Note(0, 60, 0.5, 1.0, 90)], 2.0)
    assert data[:8] == b"MThd\x00\x00\x00\x06"
    (length,) = struct.unpack(">I", data[18:22])
    assert len(data) == 22 + length
    assert b"\x90\x3c\x5a" in data
    assert data.endswith(b"\xff\x2f\x00")


# conversations


def test_framing_of_transcripts_is_exactly_that_of_af3():
    row = make_maker("test").transcription(
        messages.Clip("a.flac", 2.0, "speech", "hello there", "Hello there.")
    )
    assert row["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Transcribe the input speech."},
                {"type": "audio", "path": "a.flac"},
            ],
        },
        {
            "role": "assistant",
            "content": [{"type": "text", "text": 'The spoken content of the audio is "Hello there.".'}],
        },
    ]


def test_silence_has_an_empty_transcript():
    row = make_maker("test").transcription(messages.Clip("a.flac", 2.0, "silence"))
    assert row["messages"][1]["content"][0]["text"] == 'The spoken content of the audio is "".'


def test_multiple_choice_has_one_right_answer_among_distinct_options():
    maker = make_maker()
    for _ in range(50):
        for row in (maker.sound_choice(maker.sound_clip()), maker.instrument_choice(make_clips("piano")[0])):
            question = next(part["text"] for part in row["messages"][0]["content"] if part["type"] == "text")
            options = re.findall(r"\(([A-F])\) ([a-z ]+[a-z])", question)
            assert [letter for letter, _ in options] == list("ABCDEF"[: len(options)])
            assert len({option for _, option in options}) == len(options) >= 2
            answer = row["messages"][1]["content"][0]["text"]
            assert answer in [option for _, option in options]


def test_open_questions_about_speech_are_left_to_those_who_describe_it():
    """In training "What do you hear?" had two answers, "This is speech." and "A woman is speaking."."""

    def questions(split: str, label: str) -> set[str]:
        maker = make_maker(split)
        rows = [maker.sound(messages.Clip("a.flac", 2.0, label)) for _ in range(400)]
        parts = [part for row in rows for part in row["messages"][0]["content"]]
        return {part["text"] for part in parts if part["type"] == "text"}

    open_ones = {"What do you hear?", "Please describe what you hear.", "Briefly, what do you hear?"}
    assert not open_ones & questions("train", "speech")
    assert open_ones & questions("train", "rain")
    assert open_ones & questions("test", "speech")
    assert any("sound" in question for question in questions("train", "speech"))


def test_an_open_question_about_speech_has_a_description_for_an_answer():
    maker = make_maker("test")
    clip = messages.Clip("a.flac", 2.0, "speech", "come in", "Come in.", "woman")
    answers = {}
    for _ in range(400):
        question, answer = (
            [p["text"] for p in m["content"] if "text" in p] for m in maker.sound(clip)["messages"]
        )
        answers[question[0]] = answer[0]
    assert answers["What do you hear?"] == 'A woman is speaking and she says "Come in.".'
    assert answers["Classify the sound."] == "This is speech."


def test_options_are_chosen_in_words_too():
    maker = make_maker()
    for _ in range(50):
        row = maker.options()
        turns = [message["content"][0]["text"] for message in row["messages"]]
        assert row["audio"] == []
        assert len(turns) == 10
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            assert answer in question
            assert re.search(rf"\([A-F]\) {answer}\b", turns[0])


def test_a_clip_is_asked_about_again_without_sending_it_twice():
    maker = make_maker()
    lengths = set()
    for _ in range(50):
        clip = maker.sound_clip()
        row = maker.asked_again(maker.sound(clip), clip)
        messages.check_conversation(row)
        assert row["audio"] == [clip.path]
        lengths.add(len(row["messages"]))
        for answer in row["messages"][3::2]:
            assert answer["content"][0]["text"] == maker.labels[clip.label].choice
    assert lengths == {2, 4, 6}


def test_comparison_names_the_right_clip():
    maker = make_maker()
    for _ in range(50):
        row = maker.compare()
        place = ("first", "second").index(row["place"])
        named = row["messages"][1]["content"][0]["text"]
        label = row["audio"][place].split("/")[1]
        assert named == f"The {row['place']} clip is {maker.labels[label].phrase}."
        assert row["audio"][0].split("/")[1] != row["audio"][1].split("/")[1]


def test_whether_two_sounds_are_the_same_follows_behind_their_names():
    maker = make_maker()
    verdicts = []
    for _ in range(100):
        row = maker.describe_both()
        named = row["messages"][1]["content"][0]["text"]
        first, second = (maker.labels[path.split("/")[1]].phrase for path in row["audio"])
        names, _, verdict = named.rstrip(".").partition(", so they are ")
        assert names == f"The first is {first} and the second is {second}"
        assert verdict in ("", "the same" if first == second else "different")
        verdicts.append(verdict)
    assert set(verdicts) == {"", "the same", "different"}


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_every_kind_keeps_the_schema_and_survives_json(split):
    maker = make_maker(split)
    rows = maker.text_only()
    for make in (
        maker.is_speech,
        maker.follow_up,
        maker.compare,
        maker.describe_both,
        maker.longer,
        maker.count_clips,
    ):
        rows += [make() for _ in range(30)]
    rows += [maker.sound(maker.sound_clip()), maker.instrument(make_clips("organ")[0])]
    for row in rows:
        messages.check_conversation(row)
        assert json.loads(json.dumps(row)) == row
        assert {"id", "audio", "duration_s", "messages"} <= set(row)
    assert len({row["id"] for row in rows}) == len(rows)


def test_the_capital_of_france_is_learned():
    answers = [row["messages"][1]["content"][0]["text"] for row in make_maker().text_only()]
    assert answers.count("The capital of France is Paris.") > 1


def test_instruments_are_named_in_english():
    maker = make_maker()
    named = {label: maker.instrument_answer(make_clips(label)[0]) for label in instruments.INSTRUMENTS}
    assert named["organ"] == "The instrument is an organ."
    assert named["accordion"] == "The instrument is an accordion."
    assert named["piano"] == "The instrument is a piano."


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row["messages"].pop(),
        lambda row: row.update(audio=[]),
        lambda row: row["messages"][0]["content"][0].update(text=" "),
    ],
)
def test_broken_rows_are_refused(change):
    row = make_maker("test").transcription(messages.Clip("a.flac", 2.0, "speech", "hello"))
    change(row)
    with pytest.raises(ValueError, match="test-transcription"):
        messages.check_conversation(row)


def test_paths_must_stay_in_the_data_folder():
    row = make_maker("test").transcription(messages.Clip("/etc/a.flac", 2.0, "speech", "hello"))
    with pytest.raises(ValueError, match="not relative"):
        messages.check_conversation(row)


def test_no_two_labels_share_a_wording():
    labels = messages.read_labels()
    assert (
        len({label.choice for label in labels.values()})
        == len(labels)
        == len({lab.phrase for lab in labels.values()})
    )


@pytest.mark.parametrize("is_further", [False, True])
def test_families_of_sounds_make_sound(is_further):
    pytest.importorskip("scipy")
    from recipes.nano.nano_data import events, events_further

    for label, families in (events_further if is_further else events).FAMILIES.items():
        assert is_further or len(families) >= 3, label
        for family in families if is_further else (families[0], families[-1]):
            waveform = np.asarray(family(np.random.default_rng(1), 1.0))
            assert waveform.shape == (16000,)
            assert np.isfinite(waveform).all()
            assert waveform.std() > 1e-5, (label, family.__name__)


def test_a_family_is_held_out_of_all_but_its_own_split(tmp_path):
    pytest.importorskip("scipy")
    pytest.importorskip("soxr")
    from recipes.nano.nano_data.events import FAMILIES

    for label in ("knocking", "rain"):
        held_out = f"synthesis/{FAMILIES[label][-1].__name__}"
        for split in sounds.CLIPS_PER_CLASS:
            origins = {sounds.make_clip(label, split, number, [], tmp_path)[1] for number in range(6)}
            assert (origins == {held_out}) == (split == sounds.KINDS_SPLIT)
            assert split == sounds.KINDS_SPLIT or held_out not in origins


def test_further_families_are_for_training_only(monkeypatch, tmp_path):
    pytest.importorskip("scipy")
    from recipes.nano.nano_data import events, events_further

    made = {shard[1:3] for shard in sounds.further_shards(tmp_path)}
    assert made == {(label, "train") for label in events_further.FAMILIES}
    names = {family.__name__ for families in events.FAMILIES.values() for family in families}
    assert not names & {
        family.__name__ for families in events_further.FAMILIES.values() for family in families
    }
    origins = [sounds.make_further_clip("fire", "train", number, [], tmp_path)[1] for number in range(4)]
    assert origins == ["synthesis/fire_roar", "synthesis/fire_muffled"] * 2
    monkeypatch.setenv(splits.DRAW_VARIABLE, "second")
    assert sounds.further_shards(tmp_path) == []


def test_every_zipped_package_is_one_of_recordings_only():
    rows = [row for table in packages.ONLY_RECORDINGS for row in messages.read_table(table)]
    assert set(packages.ZIPPED) <= {row["package"] for row in rows}
    for row in rows:
        if inner := packages.ZIPPED.get(row["package"]):
            assert row["files"].startswith(inner.rsplit("/", 1)[0])
    packages_of = [
        {row["package"] for row in messages.read_table(table)} for table in packages.ONLY_RECORDINGS
    ]
    assert not set.intersection(*packages_of)


def test_more_recordings_make_a_set_of_their_own(monkeypatch, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("soxr")
    table = ["package\tlicence\tclass\tfiles"]
    for name in ("one", "two", "three", "four"):
        noise = np.random.default_rng(len(table)).standard_normal(8000) * 0.1
        soundfile.write(tmp_path / f"{name}.wav", noise, 16000)
        table.append(f"p\tCC0-1.0\train\t{name}.wav")
    (tmp_path / "more.tsv").write_text("\n".join(table) + "\n")
    monkeypatch.setattr(messages, "TABLES", tmp_path)
    found = sounds.split_recordings(sounds.find_recordings(tmp_path, "more.tsv"))
    assert [len(found["rain"][split]) for split in ("train", "test")] == [3, 1]
    shards = sounds.recorded_shards(tmp_path, "sound_more", found)
    counts = {split: sum(len(shard[3]) for shard in shards if shard[2] == split) for split in found["rain"]}
    assert counts == {"train": 3 * sounds.CLIPS_PER_RECORDING, "test": sounds.CLIPS_PER_RECORDING}
    for split, chosen in found["rain"].items():
        made = [
            sounds.make_recorded_clip("sound_more", "rain", split, number, chosen, tmp_path)
            for number in range(8)
        ]
        assert {path for _, path in made} <= {recording.path for recording in chosen}
        assert len({len(waveform) for waveform, _ in made}) > 1
    monkeypatch.setenv(splits.DRAW_VARIABLE, "second")
    assert {shard[2] for shard in sounds.recorded_shards(tmp_path, "sound_more", found)} == {"test"}


def test_a_recording_whose_name_misleads_has_the_class_that_is_heard(monkeypatch, tmp_path):
    rows = [("plane.wav", "animal"), ("sword.wav", "-"), ("jet.wav", "")]
    for name, _ in rows:
        (tmp_path / name).write_bytes(b"")
    lines = [f"p\tCC0-1.0\tengine\t{name}\t{heard}" for name, heard in rows]
    (tmp_path / "heard.tsv").write_text("\n".join(["package\tlicence\tclass\tfiles\theard", *lines]) + "\n")
    monkeypatch.setattr(messages, "TABLES", tmp_path)
    recordings = sounds.find_recordings(tmp_path, "heard.tsv")
    monkeypatch.setattr(sounds, "write_clip", lambda path, waveform: len(waveform) / 16000)

    def make(label, split, number, chosen, unpacked):
        return np.zeros(16000), chosen[number].path

    assert sounds.make_one(tmp_path / "000", make, "engine", "test", range(3), recordings, tmp_path)
    rows = list(store.read_jsonl(tmp_path / "000" / store.INDEX_NAME))
    assert [(row["origin"], row["label"]) for row in rows] == [("plane.wav", "animal"), ("jet.wav", "engine")]


def test_the_trainer_encodes_all_sounds_of_training_before_it_starts():
    assert set(corpus.SOUNDS["train"]) <= set(SETS)


def test_further_recordings_are_for_training_only(monkeypatch, tmp_path):
    for table in packages.ONLY_RECORDINGS:
        assert {row["split"] for row in messages.read_table(table)} == {"train"}
    (tmp_path / "one.wav").write_bytes(b"")
    table = "package\tlicence\tclass\tfiles\tsplit\np\tCC0-1.0\train\tone.wav\ttrain\n"
    (tmp_path / "further.tsv").write_text(table)
    monkeypatch.setattr(messages, "TABLES", tmp_path)
    found = sounds.split_recordings(sounds.find_recordings(tmp_path, "further.tsv"))
    assert {shard[2] for shard in sounds.recorded_shards(tmp_path, "sound_further", found)} == {"train"}


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
@pytest.mark.parametrize("is_zipped", [False, True])
def test_of_a_package_of_recordings_only_these_are_unpacked(monkeypatch, tmp_path, is_zipped):
    tree, game = tmp_path / "tree", "usr/share/games/game"
    contents = {"audio/rain.ogg": b"rain", "audio/voice/hello.ogg": b"hello", "art/tree.png": b"tree"}
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: game-data\nVersion: 1\nArchitecture: all\nMaintainer: A B <a@b.org>\nDescription: game\n"
    )
    for name, data in {"usr/share/doc/game-data/copyright": b"CC0", f"{game}/readme": b"game"}.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data)
    if is_zipped:
        with zipfile.ZipFile(tree / game / "public.zip", "w") as zipped:
            for name, data in contents.items():
                zipped.writestr(name, data)
        monkeypatch.setattr(packages, "ZIPPED", {"game-data": f"{game}/public.zip"})
    else:
        for name, data in contents.items():
            (tree / game / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / game / name).write_bytes(data)
    archive = tmp_path / "game-data.deb"
    subprocess.run(["dpkg-deb", "-b", str(tree), str(archive)], check=True, capture_output=True)
    row = {"package": "game-data", "files": f"{game}/audio/*.ogg"}
    monkeypatch.setattr(packages, "read_table", lambda name: [row] if name.startswith("further") else [])
    (target := tmp_path / "target").mkdir()
    packages.unpack("game-data", archive, target)
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert found == {f"{game}/audio/rain.ogg", "usr/share/doc/game-data/copyright"}


def test_an_encoder_is_read_from_a_ctranslate2_file() -> None:
    import struct

    from recipes.nano.nano_data.encoder import convert

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    def array(name: str, values: np.ndarray) -> bytes:
        shape = struct.pack(f"<{values.ndim}I", *values.shape)
        return (
            text(name)
            + struct.pack("<B", values.ndim)
            + shape
            + struct.pack("<BI", 4, values.nbytes)
            + values.tobytes()
        )

    joined, bias = np.arange(24, dtype=np.float16).reshape(6, 4), np.arange(6, dtype=np.float16)
    arrays = {
        "decoder/conv1/weight": joined,
        "encoder/conv1/weight": joined,
        "encoder/layer_norm/gamma": bias,
        "encoder/layer_0/self_attention/linear_0/weight": joined,
        "encoder/layer_0/self_attention/linear_0/bias": bias,
        "encoder/layer_0/ffn/linear_0/bias": bias,
        "encoder/position_encodings/encodings": joined,
    }
    scalar = text("encoder/num_heads") + struct.pack("<BBIh", 0, 2, 2, 6)
    header = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(arrays) + 1)
    tensors = convert(header + scalar + b"".join(array(*item) for item in arrays.items()))
    prefix = "audio_tower.layers.0.self_attn."
    assert set(tensors) == {
        "audio_tower.conv1.weight",
        "audio_tower.layer_norm.weight",
        "audio_tower.layers.0.fc1.bias",
        "audio_tower.embed_positions.weight",
        *(f"{prefix}{part}_proj.weight" for part in "qkv"),
        f"{prefix}q_proj.bias",
        f"{prefix}v_proj.bias",
    }
    assert np.array_equal(tensors[f"{prefix}k_proj.weight"], joined[2:4])
    assert np.array_equal(tensors[f"{prefix}v_proj.bias"], bias[4:])


# transcripts as they are written, and newcomers' questions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q", "Q."),
        ("the seven key for q and the nine key for z", "The seven key for Q and the nine key for Z."),
        ("come at nine a m", "Come at nine a.m."),
        ("it's five o'clock", "It's five o'clock."),
        ('he said "go"', "He said go."),
        ("What is it?", "What is it?"),
        ("", ""),
    ],
)
def test_transcripts_are_written_as_sentences(text, expected):
    assert writing.written(text) == expected


def test_what_is_written_is_what_is_scored():
    for text in ("come at nine a m", "the letter q", "it's i who asked"):
        assert normalise.normalise(writing.written(text)) == text


def test_a_draw_has_other_tests_of_what_is_held_out_and_nothing_else(monkeypatch, tmp_path):
    rows = [
        {"id": str(n), "split": "test", "source": "x", "original": f"S {n}.", "text": f"sentence number {n}"}
        for n in range(300)
    ]
    wanted = speech.SpeechSet("test_sentences", "hibari", "test", 0.1, kinds=("single",))
    usual, usual_shards = speech.plan_clips(wanted, rows), sounds.shards(tmp_path)
    usual_seed = splits.seed_for("sound", "rain", "test", 0)
    monkeypatch.setenv(splits.DRAW_VARIABLE, "second")
    assert splits.seed_for("sound", "rain", "test", 0) != usual_seed
    other = speech.plan_clips(wanted, rows)
    assert [clip.rows for clip in other] != [clip.rows for clip in usual]
    made = [shard for shard in usual_shards if shard[2].startswith("test")]
    assert sounds.shards(tmp_path) == made
    assert made
    assert {shard[1] for shard in instruments.shards(tmp_path)} == {"test", "test_timbre"}
    assert splits.made_now(["train", "train_words", "valid", "test_long"]) == ["test_long"]
    assert splits.text_split("sentence number 1") == "train"


def test_each_fifth_pattern_of_a_kind_is_for_the_tests():
    patterns = [str(number) for number in range(11)]
    held_out = set(messages.patterns_of(patterns, "test"))
    assert held_out == {"4", "9"}
    assert held_out.isdisjoint(messages.patterns_of(patterns, "train"))
    prompts = {split: messages.Prompts(split) for split in ("train", "test")}
    for kind in newcomers.KINDS:
        assert prompts["train"].patterns[kind]
        assert not set(prompts["train"].patterns[kind]) & set(prompts["test"].patterns[kind])


def test_numbers_and_names_of_a_transcript():
    assert newcomers.numbers_in("press twenty three then one hundred") == ["twenty three", "one hundred"]
    assert newcomers.numbers_in("one of them") == []
    assert newcomers.names_in("Call Mary and Tom, Mary.", {"Mary", "Tom"}) == ["Mary", "Tom"]


def test_a_voice_is_a_mans_or_a_womans_where_that_is_sure():
    voice = {"engine": "hibari", "name": "heart", "shift": 1.0, "tempo": 1.0}
    assert newcomers.voice_of(voice) == "woman"
    assert newcomers.voice_of({**voice, "shift": 0.8}) == ""
    assert newcomers.voice_of({**voice, "engine": "piper", "name": "joe"}) == "man"
    assert newcomers.voice_of(None) == ""


@pytest.mark.parametrize("kind", newcomers.KINDS)
def test_every_question_of_newcomers_has_an_answer(kind):
    text, original = "please call mary at the twenty three", "Please call Mary at the twenty three."
    clip = messages.Clip("audio/a.flac", 6.6, "speech", text, original, "woman")
    expected = {
        "describe": 'A woman is speaking and she says "Please call Mary at the twenty three.".',
        "summarize": 'I cannot summarize these words: "Please call Mary at the twenty three.".',
        "gender": "The speaker is a woman.",
        "last_words": 'It ends with the last words of "Please call Mary at the twenty three.".',
        "first_words": 'It starts with the first words of "Please call Mary at the twenty three.".',
        "duration": "It lasts about seven seconds.",
        "music": "No, there is no music.",
        "number": "The number is twenty three.",
        "name": "The name is Mary.",
    }
    phrases = {name: label.phrase for name, label in messages.read_labels().items()}
    asked = newcomers.Newcomer(messages.Prompts("train"), random.Random(0), phrases)
    question, answer = asked.pair(kind, clip)
    assert question
    assert answer == expected.get(kind, answer)
    assert "{" not in question + answer


def test_questions_about_speech_are_answered_where_there_is_none():
    phrases = {name: label.phrase for name, label in messages.read_labels().items()}
    asked = newcomers.Newcomer(messages.Prompts("train"), random.Random(0), phrases)
    rain, piano = messages.Clip("a.flac", 3.0, "rain"), messages.Clip("b.flac", 3.0, "piano")
    assert asked.pair("gender", rain)[1] == newcomers.NO_SPEECH
    assert asked.pair("summarize", rain)[1] == asked.pair("describe", rain)[1]
    assert asked.pair("last_words", rain)[1] == newcomers.NO_SPEECH
    assert asked.pair("describe", rain)[1] == "This is the sound of rain or noise."
    assert asked.pair("music", piano)[1] == "Yes, there is music."
    assert asked.pair("describe", piano)[1] == "This is music played on the piano."


def test_whatever_quotes_a_clip_opens_its_quote_where_a_transcript_does():
    """Layer 0 counts positions from `assistant`: one token more in front of the quote, and every word has another's."""
    tokenizer = Tokenizer.from_file(str(BUILT_IN_FOLDER / "tokenizer.json"))
    openings = [messages.TRANSCRIPTION, *newcomers.DESCRIPTIONS.values()]
    openings += [newcomers.NO_SUMMARY, newcomers.LOOK_FOR_IT, newcomers.LAST_WORDS, newcomers.FIRST_WORDS]
    places = {tokenizer.encode(f"assistant\n{text}").tokens.index(vocabulary.QUOTE) for text in openings}
    assert len(places) == 1
    assert {text[-8:] for text in openings} == {'{text}".'}
    openings.append(conversations.SENTENCES_ANSWER)
    assert {text.partition(vocabulary.QUOTED)[0] for text in openings} == {*vocabulary.OPENINGS}


def test_later_turns_have_a_clip_of_their_own_now_and_then_in_training():
    maker = make_maker()
    rows = [maker.follow_up() for _ in range(400)]
    heard = [
        [part["path"] for part in message["content"] if part["type"] == "audio"]
        for row in rows
        for message in row["messages"][2:]
    ]
    assert 0.1 < sum(map(bool, heard)) / 400 < 0.3
    assert len({row["id"] for row in rows}) == 400
    for row in rows:
        messages.check_conversation(row)
    test = make_maker("test")
    assert all(len(test.follow_up()["audio"]) == 1 for _ in range(100))


def test_later_turns_transcribe_all_speech_and_ask_about_it_in_training_only():
    maker = make_maker()
    maker.spoken = [
        messages.Clip(f"audio/{n}.flac", 3.0, "speech", f"good day {n}", f"Good day {n}.") for n in range(40)
    ]
    rows = [maker.follow_up() for _ in range(400)]
    ends = [row for row in rows if row["messages"][-1]["content"][0]["text"].startswith("The spoken content")]
    assert len({row["audio"][0] for row in ends if "good day" in row.get("text", "")}) > 30
    assert all(len(row["audio"]) == 1 and len(row["messages"]) >= 4 for row in rows if "text" in row)
    test = make_maker("test")
    assert not any("good day" in test.follow_up().get("text", "") for _ in range(100))


def test_whoever_asks_for_a_word_gets_all_words():
    asked = newcomers.Newcomer(messages.Prompts("train"), random.Random(0), {})
    clip = messages.Clip("a.flac", 3.0, "speech", "please call mary", "Please call Mary.")
    pairs = [asked.pair("word", clip) for _ in range(300)]
    assert {answer for _, answer in pairs} == {'Look for it in these words: "Please call Mary.".'}
    assert sum("please" in question for question, _ in pairs) > 20
    others = set(asked.other_words) - {"please", "call", "mary"}
    assert len({word for question, _ in pairs for word in others if word in question}) > 50


@pytest.mark.parametrize(
    ("split", "folder", "lengths"), [("train", "train", {3.0, 20.0}), ("test", "test_sentences", {3.0})]
)
def test_newcomers_ask_about_long_clips_in_training(tmp_path, split, folder, lengths):
    shard = tmp_path / "audio" / "speech" / folder / "hibari" / "0000"
    rows = [
        {"file": f"{seconds}.flac", "duration_s": seconds, "text": "good day", "original": "Good day."}
        for seconds in (3.0, 20.0)
    ]
    store.write_jsonl(shard / store.INDEX_NAME, rows)
    maker = corpus.make_maker(tmp_path, split)
    assert {clip.duration_s for clip in maker.spoken} == lengths
    assert {clip.duration_s for clip in maker.by_label["speech"]} == {3.0}
