#!/usr/bin/env bash
# The complete pipeline at a small size, from synthetic data to a spoken answer; see docs/miniature.md. Run it in the root
# of the repository after pip install '.[train,convert,espeak]'. All output is written to ./miniature.
#
#   launch/miniature.sh [RECORDING ...]      additional recordings to train on
set -euo pipefail

M=miniature
[ ! -e "$M" ] || { echo "launch/miniature.sh: ./$M exists already; remove it or run in another folder" >&2; exit 2; }
mkdir "$M"

# Audio and text; a codec and a language model with random weights.
moss-jax corpus "$M/corpus" --utterances 200 ${1:+--recordings "$@"}
moss-jax init-random "$M/system"

# Training examples.
tokenize() { moss-jax tokenize "$M/corpus/$1.jsonl" --model "$M/system" --format "$2" -o "$M/data/$3"; }
tokenize text text text
tokenize text-valid text text-valid
tokenize speech interleaved interleaved
tokenize speech tts tts
tokenize speech asr asr
tokenize chat chat chat
tokenize chat-valid chat chat-valid
if [ -e "$M/corpus/recordings.jsonl" ]; then tokenize recordings speech recordings; fi

# Train a tiny Qwen3 on text, split it into two branches, and train speech: first frozen, then all, then conversations.
moss-jax train --config configs/miniature/text.py
moss-jax convert --model "$M/runs/text/exports/200" --export qwen3 -o "$M/qwen3"
moss-jax train --config configs/miniature/stage1.py
moss-jax train --config configs/miniature/unfrozen.py # comparison without freezing
moss-jax train --config configs/miniature/stage2.py
moss-jax train --config configs/miniature/sft.py

# Evaluation and exports.
best="$M/runs/sft/exports/100"
for run in text/exports/200 stage1/exports/100 unfrozen/exports/100 sft/exports/100; do
  moss-jax eval pairs "$M/corpus/pairs-valid.jsonl" --model "$M/runs/$run" -o "$M/eval/pairs-${run%%/*}"
done
moss-jax eval spoken-qa "$M/corpus/questions-valid.jsonl" --reply text --model "$best" -o "$M/eval/questions" \
  --batch-size 32 --max-new-tokens 40
head -n 40 "$M/corpus/speech.jsonl" > "$M/corpus/speech-40.jsonl"
moss-jax similarity "$M/corpus/speech-40.jsonl" --model "$best" --control "$M/qwen3" -o "$M/similarity"
moss-jax plot "$M"/runs/text "$M"/runs/stage1 "$M"/runs/unfrozen "$M"/runs/stage2 "$M"/runs/sft -o "$M/curves.png"
moss-jax chat --text "What is the capital of France?" --model "$M/runs/sft/exports/100" --reply text
moss-jax chat --text "What is the capital of France?" --model "$M/runs/sft/exports/100" -o "$M/answer.wav"
moss-jax convert --model "$M/runs/stage1/exports/100" --export qwen3 -o "$M/qwen3-after-stage1"
moss-jax convert --model "$M/runs/sft/exports/100" --export released -o "$M/released"
python launch/miniature_report.py "$M"
