"""The script that trains the packaged GPT-2s, for three steps."""

import json

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from common.runtime import RuntimeConfig
from experiments.backbones.train_gpt2 import Config, main


def test_three_steps_make_a_model_with_its_tokenizer_and_scores(tmp_path):
    lines = [f"the {n} cats and {n + 1} dogs sat on the mat number {n + 2}" for n in range(60)]
    (tmp_path / "eng.train.txt").write_text("\n\n".join(lines))
    (tmp_path / "eng.valid.txt").write_text("\n\n".join(lines[:9]))
    main(
        Config(
            tmp_path,
            out=tmp_path / "out",
            vocab_size=280,
            block=16,
            batch_size=2,
            max_steps=3,
            val_every=2,
            runtime=RuntimeConfig(device="cpu", threads=1),
        )
    )
    last = torch.load(tmp_path / "out/run-small/last.ckpt", weights_only=False)
    assert last["global_step"] == 3 and last["lr_schedulers"][0]["_last_lr"] == [0.02 * 0.04, 0.01 * 0.04, 0.01 * 0.04]
    directory = tmp_path / "out/gpt2-tiny"
    assert json.loads((directory / "training.json").read_text())["tokens_seen"] == 3 * 2 * 16
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer("3 cats , it 's 4")["input_ids"]) == "3 cats , it 's 4"
    assert GPT2LMHeadModel.from_pretrained(directory).config.vocab_size == len(tokenizer) == 280
