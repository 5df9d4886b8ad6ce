"""Sentences from packages: WordNet's glosses, Jane Austen's novels, small talk, our own grammar."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from .normalise import is_speakable, normalise
from .splits import text_split
from .templates import template_sentences

WORDNET_DIR = Path("/usr/share/wordnet")
AUSTEN_FILE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
CHATTERBOT_TOPICS = (
    "ai",
    "botprofile",
    "computers",
    "conversations",
    "emotion",
    "food",
    "gossip",
    "greetings",
    "health",
    "history",
    "humor",
    "literature",
    "money",
    "movies",
    "politics",
    "psychology",
    "science",
    "sports",
    "trivia",
)

_R_STRING = re.compile(rb"\x00\x04[\x00-\xff]\x09")  # CHARSXP header of R's XDR serialisation
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"']*\s+(?=[\"'A-Z])")
_TITLE_END = re.compile(r"\b(Mr|Mrs|Messrs|Dr|St|Col|Capt|Lieut|Rev|Esq|No)\.")


def wordnet_examples(folder: Path = WORDNET_DIR) -> Iterator[str]:
    """Example phrases and sentences of WordNet's glosses."""
    for gloss in _wordnet_glosses(folder):
        for example in re.findall(r'"([^"]+)"', gloss):
            yield example.strip()


def wordnet_definitions(folder: Path = WORDNET_DIR) -> Iterator[str]:
    """Definitions of WordNet, four words or more, without remarks in brackets."""
    for gloss in _wordnet_glosses(folder):
        definition = re.sub(r"\([^)]*\)", "", gloss.split('"')[0]).split(";")[0].strip(" :;,")
        if len(definition.split()) >= 4:
            yield definition


def _wordnet_glosses(folder: Path) -> Iterator[str]:
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8", errors="replace").splitlines():
            if not line.startswith("  ") and " | " in line:
                yield line.split(" | ", 1)[1]


def chatterbot_sentences() -> Iterator[str]:
    """English utterances of the chatterbot corpus (everyday topics; not the ones about programming)."""
    import chatterbot_corpus

    folder = Path(chatterbot_corpus.__file__).parent / "data" / "english"
    for topic in CHATTERBOT_TOPICS:
        text = (folder / f"{topic}.yml").read_text(encoding="utf-8")
        text = re.sub(r"\n {4,}(?=\S)", " ", text)  # folded lines
        for line in text.split("conversations:", 1)[1].splitlines():
            utterance = re.sub(r"^[\s-]+", "", line).strip().strip("'\"").replace("''", "'")
            for sentence in _SENTENCE_END.split(utterance):
                if sentence:
                    yield sentence


def austen_lines(unpacked: Path) -> Iterator[str]:
    """Lines of the six novels, from the lazy-load database of the R package.

    The database is a sequence of blocks, each a length and a zlib stream. In R's serialisation a string is a
    four-byte header, a four-byte length, and its bytes.
    """
    blob = (unpacked / AUSTEN_FILE).read_bytes()
    place = 0
    while (place := blob.find(b"\x78", place)) >= 0:
        try:
            decoder = zlib.decompressobj()
            data = decoder.decompress(blob[place:])
        except zlib.error:
            place += 1
            continue
        place = len(blob) - len(decoder.unused_data)
        yield from _r_strings(data)


def _r_strings(data: bytes) -> Iterator[str]:
    position = 0
    while match := _R_STRING.search(data, position):
        (length,) = struct.unpack(">i", data[match.end() : match.end() + 4])
        position = match.end() + 4
        if 0 <= length < 400:
            yield data[position : position + length].decode("utf-8", errors="replace")
            position += length


def austen_sentences(unpacked: Path) -> Iterator[str]:
    """Sentences of the novels in order; long ones are cut at semicolons."""
    paragraph: list[str] = []
    for line in [*austen_lines(unpacked), ""]:
        if line.strip():
            paragraph.append(line.strip())
            continue
        text = " ".join(paragraph).replace("_", "").replace("--", ", ")
        paragraph = []
        if text.isupper() or re.match(r"(CHAPTER|VOLUME|Chapter|Volume)\b", text):
            continue
        yield from split_sentences(text)


def split_sentences(text: str, max_words: int = 30) -> Iterator[str]:
    """Sentences of a paragraph; those over `max_words` are cut at semicolons and colons."""
    protected = _TITLE_END.sub(r"\1<dot>", text)
    for sentence in _SENTENCE_END.split(protected):
        sentence = sentence.replace("<dot>", ".").replace('"', "").strip()
        parts = re.split(r"(?<=[;:])\s+", sentence) if len(sentence.split()) > max_words else [sentence]
        yield from (part.strip() for part in parts)


def all_sentences(unpacked: Path, per_pattern: int) -> Iterator[tuple[str, str]]:
    """Yields (source, sentence) of every source."""
    for category, sentence in template_sentences(per_pattern):
        yield f"grammar-{category}", sentence
    for sentence in chatterbot_sentences():
        yield "chatterbot", sentence
    for sentence in austen_sentences(unpacked):
        yield "austen", sentence
    for sentence in wordnet_examples():
        yield "wordnet-example", sentence
    for sentence in wordnet_definitions():
        yield "wordnet-definition", sentence


def text_rows(unpacked: Path, per_pattern: int) -> Iterator[dict[str, str]]:
    """Rows {"id", "split", "source", "original", "text"}: speakable and distinct."""
    seen: set[str] = set()
    counts: dict[str, int] = {}
    for source, sentence in all_sentences(unpacked, per_pattern):
        if not is_speakable(sentence, min_words=2 if source.startswith("wordnet") else 1):
            continue
        text = normalise(sentence)
        if text in seen:
            continue
        seen.add(text)
        counts[source] = counts.get(source, 0) + 1
        row_id = f"{source}-{counts[source]:06d}"
        yield {"id": row_id, "split": text_split(text), "source": source, "original": sentence, "text": text}
