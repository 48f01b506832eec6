#!/bin/sh
# From text to a talking model on this machine, every step a command of its own. Stopped, it goes on where it was.
# sh scripts/train_demo.sh BIN FOLDER: the folder with bmojo-edge, and the one for everything that is made.
set -eu
cd "$(dirname "$0")/.."
be="$1/bmojo-edge" out="$2"
"$be" data prepare tests/data/shakespeare.txt --out "$out/data" --train-vocab 1024 --val 0.1 --overwrite
"$be" train apps/train/demo.toml --set out="$out/run" --set data.train="$out/data/train" --set data.valid="$out/data/val" --resume
"$be" convert "$out/run/model" --out "$out/model" --dtype float32 --overwrite
"$be" parity record "$out/model" --out "$out/torch.safetensors" --engine torch --overwrite
"$be" parity check "$out/model" "$out/torch.safetensors" --engine mlx
"$be" generate --model "$out/model" --prompt "KING RICHARD III:" --max-tokens 120 --temp 0.5 --seed 1
