"""Fine-tune Gemma 3 270M with transformers' Trainer.

python examples/trainer.py [--steps 2] [--length 128]
"""

from __future__ import annotations

import argparse
import tempfile

import gemma3
import transformers

import crosscut
from crosscut.integrations import huggingface


def main() -> None:
    """Train, evaluate, and say what was fused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()

    texts = [{"input_ids": ids, "labels": ids} for ids in gemma3.windows(options.length, 8)]
    model = crosscut.defer_logits(gemma3.load())
    with tempfile.TemporaryDirectory() as directory:
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                output_dir=directory,
                max_steps=options.steps,
                per_device_train_batch_size=2,
                per_device_eval_batch_size=2,
                learning_rate=1e-3,
                optim="sgd",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                prediction_loss_only=True,  # metrics of the logits would need the logits
            ),
            train_dataset=texts[:-2],
            eval_dataset=texts[-2:],
        )
        trainer.train()
        print(trainer.evaluate())
    print(*huggingface.explain(model), sep="\n")


if __name__ == "__main__":
    main()
