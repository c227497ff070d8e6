#!/usr/bin/env bash
# The whole way in small, from nothing to an answer; docs/miniature.md explains it. Run it in the root of the repository
# after pip install '.[train,convert,espeak]'; everything lands in ./miniature.
#
#   launch/miniature.sh [RECORDING ...]      other recordings to train on
set -euo pipefail

M=miniature
[ ! -e "$M" ] || { echo "launch/miniature.sh: ./$M is there already; remove it or run elsewhere" >&2; exit 2; }
mkdir "$M"

# Sound and text; a codec and a language model with random weights.
moss-jax corpus "$M/corpus" --utterances 200 ${1:+--recordings "$@"}
moss-jax init-random "$M/system"

# Files -> examples.
tokenize() { moss-jax tokenize "$M/corpus/$1.jsonl" --model "$M/system" --format "$2" -o "$M/data/$3"; }
tokenize text text text
tokenize text-valid text text-valid
tokenize speech interleaved interleaved
tokenize speech tts tts
tokenize speech asr asr
tokenize chat chat chat
tokenize chat-valid chat chat-valid
if [ -e "$M/corpus/recordings.jsonl" ]; then tokenize recordings speech recordings; fi

# A tiny Qwen3 learns to write. Split in two branches it learns to speak: first frozen, then whole, then conversations.
moss-jax train --config configs/miniature/text.py
moss-jax convert --model "$M/runs/text/exports/200" --export qwen3 -o "$M/qwen3"
moss-jax train --config configs/miniature/stage1.py
moss-jax train --config configs/miniature/unfrozen.py # beside it, to see what freezing saves
moss-jax train --config configs/miniature/stage2.py
moss-jax train --config configs/miniature/sft.py

# What came of it.
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
