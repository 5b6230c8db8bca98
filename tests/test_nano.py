"""nano-sd's parts before any training."""

import os
import subprocess
import sys

from jdm.data import load_pictures
from jdm.models import nano

CODE = """
from jdm.models import nano
print(sorted(nano.tokenizer(["a photo of an ankle boot", "one t-shirt", "two to ten photos"]).get_vocab().items()))
"""


def test_every_word_of_the_captions_is_one_token_and_any_text_still_works():
    captions = [c for row in load_pictures("fashion-mnist", "test[:2]", 32).captions for c in row]
    tokens = nano.tokenizer(captions)
    for caption in captions:
        assert len(tokens.tokenize(caption)) == len(caption.replace("t-shirt", "t - shirt").split())
        assert len(tokens(caption).input_ids) <= nano.TOKENS
    assert "".join(tokens.tokenize("Zebra!")) == "zebra</w>!</w>"


def test_two_processes_make_the_same_vocabulary():
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    seen = {subprocess.run([sys.executable, "-c", CODE], env=env | {"PYTHONHASHSEED": str(seed)}, check=True,
                           capture_output=True, text=True).stdout for seed in (1, 2)}
    assert len(seen) == 1


def test_the_unet_has_at_most_4_million_parameters():
    assert sum(p.numel() for p in nano.unet().parameters()) <= 4_000_000
