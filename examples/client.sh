#!/usr/bin/env bash
# Asks a running server (`af3 serve`) with curl: bash examples/client.sh talk.wav
set -euo pipefail
url=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
key="Authorization: Bearer ${OPENAI_API_KEY:-none}"
model=${AF3_MODEL:-nano}

curl --fail --silent --show-error "$url/audio/transcriptions" -H "$key" \
    -F model="$model" -F file=@"$1" -F response_format=vtt

printf '{"model": "%s", "max_tokens": 50, "messages": [{"role": "user", "content": [
    {"type": "text", "text": "Is someone speaking?"},
    {"type": "input_audio", "input_audio": {"format": "wav", "data": "%s"}}]}]}' "$model" "$(base64 -w0 "$1")" |
    curl --fail --silent --show-error "$url/chat/completions" -H "$key" -H "Content-Type: application/json" -d @-
echo
