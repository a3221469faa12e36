"""Names of the libraries that tokenise, as ``--tokenizer-backend`` gives them; :mod:`.backends` says what they are."""

BACKENDS = ("auto", "hf", "sentencepiece", "gigatoken")
REFERENCE = "reference"  # stands for hf or sentencepiece, whichever the tokenizer has
