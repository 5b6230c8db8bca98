"""nano-sd's parts before any training."""

import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.files import ASSETS
from jdm.models import nano

CODE = """
from jdm.models import nano
print(sorted(nano.tokenizer(["a photo of an ankle boot", "one t-shirt", "two to ten photos"], 16).get_vocab().items()))
"""


def test_every_word_of_the_captions_is_one_token_and_any_text_still_works():
    captions = [c for row in load_pictures("fashion-mnist", "test[:2]", 32).captions for c in row]
    tokens = nano.tokenizer(captions, 16)
    for caption in captions:
        assert len(tokens.tokenize(caption)) == len(caption.replace("t-shirt", "t - shirt").split())
        assert len(tokens(caption).input_ids) <= 16
    assert "".join(tokens.tokenize("Zebra!")) == "zebra</w>!</w>"


def test_an_autoencoder_that_lacks_a_weight_is_refused_and_not_filled_with_random_numbers(tmp_path):
    shutil.copytree(ASSETS / "nano-sd" / "vae", tmp_path / "vae")
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    tensors = load_file(file)
    assert nano.load_vae(str(tmp_path / "vae")).training is False
    del tensors["decoder.conv_out.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UsageError, match=r"no whole autoencoder .*1 weights of the \w+ are missing, decoder\.conv"):
        nano.load_vae(str(tmp_path / "vae"))


def test_two_processes_make_the_same_vocabulary():
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    seen = {subprocess.run([sys.executable, "-c", CODE], env=env | {"PYTHONHASHSEED": str(seed)}, check=True,
                           capture_output=True, text=True).stdout for seed in (1, 2)}
    assert len(seen) == 1


def test_the_unet_has_at_most_4_million_parameters():
    assert sum(p.numel() for p in nano.unet(nano.TeacherConfig(), (8, 8, 8)).parameters()) <= 4_000_000
