"""Complete one held-out sample of each task with the exported model, by transformers alone."""

import argparse

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from mft_megatron.data.loading.build_batch import build_batch
from mft_megatron.data.loading.dataset import PackedDataset, packed_lengths


def held_out_samples(prefix: str, longest_prompt: int):
    """For each task: its name, the prompt's ids and the answer's ids of the first validation sample with an answer."""
    dataset = PackedDataset.open(prefix, packed_lengths(prefix)[0])
    split = dataset.split("valid")
    found = {}
    for pack in range(split.num_packs):
        batch = build_batch(dataset, [split.slices_of(pack)])
        for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            supervised = np.flatnonzero(batch.loss_mask_BS[0, start:end])
            task = dataset.tasks[batch.task_ids_BS[0, start]]
            if len(supervised) > 4 and 0 < supervised[0] < longest_prompt and task not in found:
                first = start + supervised[0] + 1  # a target is the next token
                found[task] = batch.tokens_BS[0, start:first], batch.tokens_BS[0, first:end]
    return [(task, *found[task]) for task in dataset.tasks if task in found]


def main() -> None:
    """Print prompt, completion and reference of one sample per task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf", required=True, help="Hugging Face folder")
    parser.add_argument("--data-path", required=True, help="prefix of the data set")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    options = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.hf)
    model = AutoModelForCausalLM.from_pretrained(options.hf).eval()
    for task, prompt, answer in held_out_samples(options.data_path, longest_prompt=300):
        ids = torch.from_numpy(prompt)[None]
        with torch.no_grad():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.max_new_tokens, do_sample=False
            )
        print(f"\n{task}")
        print(f"  prompt     …{_one_line(tokenizer.decode(prompt)[-160:])}")
        print(f"  model      {_one_line(tokenizer.decode(output[0, len(prompt) :]))}")
        print(f"  reference  {_one_line(tokenizer.decode(answer[: options.max_new_tokens]))}")


def _one_line(text: str) -> str:
    return text.replace("\n", "⏎ ")


if __name__ == "__main__":
    main()
