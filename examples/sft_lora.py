"""Fine-tune Gemma 3 270M with TRL's SFTTrainer and LoRA, on prompts and answers.

    pip install 'crosscut[trl]'
    python examples/sft_lora.py [--steps 2] [--length 128]

TRL reads the head's weight itself and does not call the head, so there is nothing to defer: one
line has crosscut compute what TRL's trainers ask of it.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import datasets
import gemma3
import peft
import transformers
import trl

import crosscut


class Ids(transformers.PreTrainedTokenizerFast):
    """A tokenizer for a data set that is token ids already."""


def tokenizer() -> Any:
    """Knows the padding and end tokens, and no text."""
    import tokenizers

    model = tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 3}, unk_token="<unk>")
    return Ids(
        tokenizer_object=tokenizers.Tokenizer(model),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def main() -> None:
    """Train the adapters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()

    texts = gemma3.windows(options.length, 16)
    prompt = [0] * (options.length // 4) + [1] * (options.length - options.length // 4)
    rows = [{"input_ids": ids.tolist(), "completion_mask": prompt} for ids in texts]
    report = crosscut.patch_trl()
    with tempfile.TemporaryDirectory() as directory:
        trainer = trl.SFTTrainer(
            gemma3.load(),
            trl.SFTConfig(
                output_dir=directory,
                max_steps=options.steps,
                per_device_train_batch_size=2,
                learning_rate=1e-3,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(),
            peft_config=peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
        )
        trainer.train()
    print(report)


if __name__ == "__main__":
    main()
