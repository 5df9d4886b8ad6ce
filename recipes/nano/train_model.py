#!/usr/bin/env python3
"""Trains the built-in model: `python recipes/nano/train_model.py --data-dir DIR`, after build_model.py.

Encodes the clips, has Whisper say what it expects in their transcripts, and trains. The mean of the late weights is
DIR/run/model. The same command goes on after an interruption, and takes in clips and conversations that were made
meanwhile.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from build_model import load_whisper
from nano_model.training.batches import Mixture, Source, read_sources
from nano_model.training.clips import encode_clips, open_cache
from nano_model.training.forward import FastModel
from nano_model.training.loop import Plan, Run
from nano_model.training.peers import Peers
from nano_model.training.plain import make_plain
from nano_model.training.teacher import Lessons, Teacher

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor
from audioflamingo.datasets.conversations import read_dataset
from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.hub import resolve_folder
from audioflamingo.training.batches import BatchEncoder

RECIPE = Path(__file__).resolve().parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder that build_data.py filled")
    parser.add_argument(
        "--start",
        type=Path,
        help="folder of the weights to start from, or nano, those that are shipped (default: DATA_DIR/model)",
    )
    parser.add_argument("--run", default="run", help="name of the run's folder in DATA_DIR (default: run)")
    parser.add_argument(
        "--minutes", type=float, default=180, help="of training, in all sessions (default: 180)"
    )
    parser.add_argument("--learning-rate", type=float, default=1.5e-4, help="default: 1.5e-4")
    parser.add_argument(
        "--shared-share",
        type=float,
        default=Plan.shared_share,
        help="share of each step for weights that transcripts use, too: 0.15 while answers are taught (default: 1)",
    )
    parser.add_argument(
        "--self-share",
        type=float,
        help="the same for self-attention, which reads the question: 0.4 (default: --shared-share)",
    )
    parser.add_argument(
        "--batch", type=float, default=900, help="text tokens of a step, about (default: 900)"
    )
    parser.add_argument(
        "--rounding", type=float, default=0.0, help="noise as of 8 bits, 1 is as much (default: 0)"
    )
    parser.add_argument(
        "--channel-dropout",
        type=float,
        default=Plan.channel_dropout,
        help="share of the audio's channels, for answers that quote no words (default: 0)",
    )
    parser.add_argument(
        "--missteps",
        type=float,
        default=Plan.missteps,
        help="share of the steps whose transcripts go on behind the model's own words (default: 0)",
    )
    parser.add_argument(
        "--mixture", type=Path, default=RECIPE / "mixture.json", help="shares of the kinds of rows"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers", type=int, default=1, help="trainers that share the work (default: 1)")
    parser.add_argument("--rank", type=int, default=0, help="which of them this is, from 0 (default: 0)")
    parser.add_argument(
        "--encode-only",
        action="store_true",
        help="encode the clips that are there, teacher included, and stop",
    )
    return parser.parse_args()


def prepare_lessons(
    data_dir: Path, start: Path, sources: list[Source], model: Any, processor: Any
) -> Lessons:
    """What Whisper expects in the transcripts of the mixture's rows."""
    lessons = Lessons(data_dir / "lessons")
    transcripts = [source for source in sources if source.path.stem.startswith("train_transcription")]
    if transcripts:
        teacher = Teacher.of(load_whisper(data_dir / "whisper"), start / "tokenizer.json")
    for source in transcripts:
        rows = read_dataset(DatasetConfig(str(source.path)), on_bad_row="skip").rows
        lessons.make(rows, teacher, model, processor)
    return lessons


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    data_dir: Path = arguments.data_dir.resolve()
    start = resolve_folder(arguments.start or data_dir / "model")
    model: Any = AudioFlamingo3ForConditionalGeneration.from_pretrained(start, dtype=torch.float32).eval()
    make_plain(model)
    processor = AutoProcessor.from_pretrained(start)
    cache = open_cache(data_dir, model, processor)
    encode_clips(cache, data_dir, model, processor)
    sources = read_sources(arguments.mixture, data_dir)
    lessons = prepare_lessons(data_dir, start, sources, model, processor)
    if arguments.encode_only:
        return
    mixture = Mixture(
        sources,
        BatchEncoder(processor, None, cache),
        arguments.batch,
        arguments.rank,
    )
    folder = data_dir / (f"{arguments.run}-{arguments.rank}" if arguments.rank else arguments.run)
    plan = Plan(
        arguments.minutes,
        arguments.learning_rate,
        shared_share=arguments.shared_share,
        self_share=arguments.self_share,
        channel_dropout=arguments.channel_dropout,
        missteps=arguments.missteps,
    )
    fast = FastModel(model, noise=arguments.rounding, is_float8=True)
    run = Run(fast, processor, folder, plan)
    peers = Peers(data_dir / f"{arguments.run}-peers", arguments.rank, arguments.peers)
    run.train(mixture, peers, lessons)
    print(f"{run.step} steps in {run.seconds / 60:.0f} minutes; the model is {run.folder / 'model'}")


if __name__ == "__main__":
    main()
