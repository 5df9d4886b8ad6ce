"""The documentation: it builds without a warning, asks no other host for anything, and what it shows works.

Programs of a page run in order, as they stand, with hub id and file names replaced; commands must be ones that exist.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import audioflamingo
from audioflamingo.cli.commands import app
from tests.e2e.conftest import DATA

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REPLACEMENTS = {
    "nvidia/audio-flamingo-3-hf": "nano",
    "speech.flac": str(DATA / "directory_prompt.flac"),
    "animals.ogg": str(DATA / "monkeys.ogg"),
    "max_new_tokens=500": "max_new_tokens=12",
}
NOT_OURS = ("fonts.g", "unpkg.com", "cdn.", "cdnjs", "jsdelivr")


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [text for language, text in found if language in languages]


def commands(page: Path) -> list[list[str]]:
    """What stands behind `af3` in the shell blocks of a page, comments and redirections left out."""
    lines = "\n".join(blocks(page, "bash", "sh")).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        for part in re.split(r"\s\|\s|&&", line):
            words = shlex.split(part.strip(), comments=True)
            if words[:1] == ["af3"]:
                found.append(words[1 : words.index(">") if ">" in words else None])
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_every_program_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for program in blocks(page, "python"):
        for text, replacement in REPLACEMENTS.items():
            program = program.replace(text, replacement)
        exec(compile(program, str(page), "exec"), names)
    assert capsys.readouterr().out.strip()
    if "loss" in names:
        assert names["loss"].isfinite()
        assert any(p.grad is not None for p in names["model"].parameters())
    assert len(names.get("answers", "ab")) == len(names.get("transcripts", "ab")) == 2


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.stem)
def test_every_command_exists(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    for words in commands(page):
        if words[0].startswith("-"):
            continue
        assert words[0] in group.commands, words
        if words[0] == "evaluate" and "--compare" not in words:
            assert {"-o", "--output-dir"} & set(words), f"{words}: a folder for the results is needed"
        command = group.commands[words[0]]
        options = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        used = {word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-zA-Z]", word)}
        assert used <= {*options, "--help"}, words


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert text.count("![") == 1


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built documentation; any warning fails."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_asks_no_other_host(site: Path) -> None:
    for path in (p for p in site.rglob("*.html")):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]+src="([^"]+)"', text)
        loaded += re.findall(
            r'<link[^>]+rel="(?:stylesheet|preload|preconnect|icon)"[^>]+href="([^"]+)"', text
        )
        loaded += re.findall(
            r'<link[^>]+href="([^"]+)"[^>]+rel="(?:stylesheet|preload|preconnect|icon)"', text
        )
        assert not [url for url in loaded if "//" in url], path
        assert not [host for host in NOT_OURS if f'="https://{host}' in text], path


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    text = (site / "reference" / "python.html").read_text(encoding="utf-8")
    for name in audioflamingo.__all__:
        if name != "errors":
            assert f'id="audioflamingo.{audioflamingo._MODULE_OF[name]}.{name}"' in text, name
    for method in ("from_pretrained", "save_pretrained", "load_adapter", "forward"):
        assert f'AudioFlamingo3ForConditionalGeneration.{method}"' in text, method
    options = (site / "reference" / "options.html").read_text(encoding="utf-8")
    for name in ("engine.generate.generate", "engine.generate.stream", "training.trainer.train"):
        assert f'id="audioflamingo.{name}"' in options, name


def test_every_command_and_route_is_in_the_reference(site: Path) -> None:
    text = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        assert f'id="af3-{name}"' in text
        for option in (p for p in command.params if p.param_type_name == "option"):
            assert f"<code>{option.opts[0]}</code>" in text, (name, option.opts)
    assert "POST /v1/chat/completions" in (site / "reference" / "http.html").read_text(encoding="utf-8")
    assert (site / "openapi.json").exists()


def test_the_site_is_searched_from_a_disk(site: Path, browser: Any) -> None:
    """No server, no other host: the result comes from the index beside the pages."""
    page = browser.new_page()
    page.set_default_timeout(120_000)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{site.as_uri()}/about/limits.html", wait_until="domcontentloaded")
    box, result = page.locator("input.md-search__input"), page.locator("a.md-search-result__link").first
    for _ in range(30):  # what is typed before the page's programs run is not heard
        box.fill("")
        box.press_sequentially("balancer")
        page.wait_for_timeout(3000)
        if result.count():
            break
    result.wait_for()
    assert site.as_uri() in result.get_attribute("href")
    assert [url for url in asked if not url.startswith(("file://", "data:", "blob:"))] == []
    page.close()
