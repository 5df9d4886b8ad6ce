"""The reference of the library: every public name, taken from the package; mkdocstrings fills in the rest."""

from __future__ import annotations

import audioflamingo

# What the public functions take and give, and the functions behind the commands.
FURTHER = {
    "Transcription": (
        "transcription.transcription_options.TranscriptionOptions",
        "transcription.transcription_options.VadOptions",
        "transcription.segments.Segment",
        "transcription.transcriber.transcribe_all",
    ),
    "Answers": (
        "engine.generate.generate",
        "engine.generate.stream",
        "engine.generate_options.GenerateOptions",
        "engine.generate.GenerateOutput",
        "engine.generate.GenerationStep",
        "processor.collate.BatchFeature",
    ),
    "Quantization": ("quantization.schemes.QuantizationConfig", "quantize_folder.quantize_checkpoint"),
    "Training": (
        "training.trainer.train",
        "training.training_config.load_config",
        "training.training_config.TrainingConfig",
    ),
    "Evaluation": ("evaluation.evaluate_dataset.evaluate", "evaluation.scoring.Summary"),
    "Server": ("server.server_settings.ServerSettings", "server.asgi_app.create_app"),
}


# Its methods are its bases', but for `generate` and `stream`, which are functions of the engine.
MODELS = ("AudioFlamingo3ForConditionalGeneration",)


def python_page() -> str:
    """A page with all names that the package itself has."""
    lines = ["# Python", "", "All that `from audioflamingo import ...` has.", ""]
    for name in audioflamingo.__all__:
        if name != "errors":
            lines += [f"::: audioflamingo.{audioflamingo._MODULE_OF[name]}.{name}"]
            lines += ["    options:", "      inherited_members: true", ""] if name in MODELS else [""]
    return "\n".join(lines)


def options_page() -> str:
    """A page with what those take and give."""
    lines = ["# Options and results", ""]
    for title, names in FURTHER.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += [f"::: audioflamingo.{name}", "    options:", "      heading_level: 3", ""]
    return "\n".join(lines)


def errors_page() -> str:
    """A page with the errors and warnings."""
    return "# Errors\n\n::: audioflamingo.errors\n    options:\n      show_root_heading: false\n"
