"""Records that the data sets of many tests are made of."""

from tests import source_code


def task_records(count: int) -> dict[str, list[dict]]:
    """Records of four tasks of very different size, each in another format.

    Of 136 functions the last two tasks are so small that steps of 8 packs, or micro-batches, lack them although packs
    and order mix tasks.
    """
    code = [text for text in source_code.functions(seed=14, count=count) if 60 < len(text) < 260]
    return {
        "completion": [{"prompt": text[:40], "completion": text[40:]} for text in code],
        "explain": [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text.split("(")[0]}]}
            for text in code[::2]
        ],
        "write": [{"instruction": text.split("\n")[0], "input": "", "output": text} for text in code[::6]],
        "read": [{"text": text} for text in code[::15]],
    }
