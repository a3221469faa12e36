"""From records to rows of tokens: numpy alone, no torch (docs/FORMATS.md).

::

    JSONL ─► conversation ─► chat_format ─► tokenizer ─► indexed_dataset + ledger ─► packing      preprocess
                                                                      dataset ─► step_plan, rows  training
"""
