"""What `jdm prepare` leaves on disk: the same bits as without it, and a line on whatever has changed since."""

import errno
import fcntl
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from families import made
from jdm import prepare as writing
from jdm.cli.parser import main
from jdm.data import cache as prepared
from jdm.data.cache import Cache
from jdm.data.latents import encoded
from jdm.data.sources import Pictures, load_pictures
from jdm.errors import RunError, UsageError
from jdm.files import LOCK
from jdm.library import load_model
from jdm.models.folder import save_pipeline
from jdm.models.text import TextEncoder
from jdm.prepare import prepare
from jdm.recipes import all_recipes, recorded
from jdm.reproduce.models import Model, essence
from jdm.run import Data, Run
from jdm.training.trainer import Trainer
from photos import folder_of
from tiny import cached

pytestmark = pytest.mark.usefixtures("untrained_judge")
RECIPES, SLOW = all_recipes(), pytest.mark.slow


def small(name: str, out: Path, teacher: Path, **changes) -> Run:
    return tiny.run(RECIPES[name](), out, teacher, steps=2, save_every=2, **changes)


def pictures_of(run: Run, loaded: Pictures) -> Pictures:
    """The split as the run's prepared folder has it."""
    return Cache.read(Path(run.data.prepared)).pictures(run.data, loaded)


def states_of(run: Run, encoder: TextEncoder) -> TextEncoder:
    """The encoder, reading the states of the run's prepared folder."""
    encoder.stored = Cache.read(Path(run.data.prepared)).text(encoder)
    return encoder


def losses(run: Run) -> list[dict]:
    trainer = Trainer(run)
    return [{k: float(v) for k, v in trainer.step(s).items()} for s in range(trainer.start, run.steps)]


@pytest.fixture
def photos(tmp_path):
    """A folder of 30 noisy PNG files with captions: 26 of them train."""
    folder, rng = folder_of(tmp_path / "photos", count=30), np.random.default_rng(0)
    for file in folder.glob("*.png"):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(file, compress_level=0)
    return folder


@pytest.fixture
def ready(photos, teacher, tmp_path):
    """(a run of the ControlNet on those pictures, its prepared folder)."""
    run = small("nano-controlnet", tmp_path / "run", teacher,
                data=Data(source=str(photos), size=32, split="train", validation="train[:2]"))
    prepare(run, tmp_path / "prepared", "nano-controlnet")
    return run, tmp_path / "prepared"


# The same bits


@pytest.mark.parametrize("name", ["nano-canny", "nano-controlnet", "nano-diff-instruct in bf16", *(
    pytest.param(name, marks=SLOW) for name in ("nano-dsm", "nano-posterior", "nano-teacher", "nano-nct",
                                                "nano-diff-instruct", "nano-controlled-teacher"))])
def test_a_prepared_run_has_the_same_losses(name, teacher, tmp_path, monkeypatch):
    """Neither its latents nor its text states are computed again, and prompts met the attention it trains with."""
    name, _, precision = name.partition(" in ")
    run = replace(small(name, tmp_path / "plain", teacher), precision=precision or "fp32")
    wanted = losses(run)
    assert wanted[0] != wanted[1]
    torch.backends.cuda.enable_flash_sdp(True)  # as a new process has it
    prepare(run, tmp_path / "cache")
    monkeypatch.setattr("jdm.loading.Loaded.warn_of_misfits", lambda self: None)  # it encodes a few pictures
    monkeypatch.setattr("jdm.space.Space.encode", None)
    if name != "nano-teacher":  # its text encoder trains
        monkeypatch.setattr(TextEncoder, "encode", None)
    assert losses(cached(run, tmp_path / "cache", tmp_path / "quick")) == wanted


def test_pictures_that_are_not_square_are_prepared(photos, teacher, tmp_path):
    run = small("nano-controlnet", tmp_path / "run", teacher,
                data=Data(source=str(photos), size=(28, 44), split="train", validation="train[:2]"))
    wanted = losses(run)
    prepare(run, tmp_path / "cache", "nano-controlnet")
    assert losses(cached(run, tmp_path / "cache", tmp_path / "quick")) == wanted
    other = replace(run, data=replace(run.data, size=(44, 28)), out=tmp_path / "new")
    changed(other, tmp_path / "cache", r"size .*\(28 x 44, not 44 x 28\)")


@SLOW
def test_a_guide_finds_its_own_text_states(teacher, tmp_path):
    model = load_model(str(teacher))
    with torch.no_grad():
        model.text_encoder.get_input_embeddings().weight.mul_(1.5)
    guide = save_pipeline(model, tmp_path / "guide")
    run = small("nano-text-guided", tmp_path / "run", teacher)
    run = replace(run, method=replace(run.method, guidance=replace(run.method.guidance, teacher=str(guide))))
    assert [part.partition("-")[0] for part in prepare(run, tmp_path / "cache")] == ["pictures", "text", "text"]
    for folder in (teacher, guide):
        encoder, plain = (load_model(str(folder)).text(one_by_one=True) for _ in range(2))
        states_of(cached(run, tmp_path / "cache"), encoder)
        encoder.encode = None  # type: ignore[assignment]
        assert torch.equal(encoder(["a dress"]), plain(["a dress"]))  # type: ignore[arg-type]


def test_only_what_a_method_asks_for_is_made(teacher, tmp_path):
    kinds = {}
    for name in ("nano-controlnet", "nano-teacher", "nano-vae"):
        parts = prepare(small(name, tmp_path / "run", teacher), tmp_path / name)
        kinds[name] = [part.partition("-")[0] for part in parts]
        assert all(sum(f.stat().st_size for f in (tmp_path / name / part).iterdir()) == parts[part] for part in parts)
    assert kinds == {"nano-controlnet": ["latents", "pictures", "text"], "nano-teacher": ["latents", "pictures"],
                     "nano-vae": ["pictures"]}


def test_prepared_parts_equal_loading_and_encoding(ready, teacher, monkeypatch):
    run, folder = ready
    loaded = load_pictures(run.data.source, "train", 32)
    read, rows = pictures_of(cached(run, folder), loaded), torch.tensor([25, 0, 3])
    wanted, whole = loaded.batch(rows), loaded.batch(torch.arange(26))
    monkeypatch.setattr("jdm.data.folder.load_picture", None)
    assert torch.equal(read.batch(rows), wanted)
    assert (loaded.slow, read.slow) == (True, False)  # nothing is left to decode
    assert wanted.unique().numel() > 200
    model = load_model(str(teacher))
    plain = model.space.encode(whole.float() / 127.5 - 1)
    assert torch.equal(encoded(model.space, read), plain)
    encoder, other = (model.text(one_by_one=True) for _ in range(2))
    asked = ["caption 5", "", "caption 29", "caption 5"]
    assert torch.equal(states_of(cached(run, folder), encoder)(asked), other(asked))  # type: ignore[arg-type]
    assert len(encoder.stored) == 27


def test_sdxls_pooled_and_zero_states_are_kept(photos, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = save_pipeline(made("sdxl"), tmp_path / "teacher")
    run = small("nano-posterior", tmp_path / "plain", teacher,
                data=Data(source=str(photos), split="train", validation="train[:2]"))
    wanted = losses(run)
    prepare(run, tmp_path / "cache")
    fast = cached(run, tmp_path / "cache", tmp_path / "quick")
    encoder, other = (load_model(str(teacher)).text(one_by_one=True) for _ in range(2))
    states_of(fast, encoder)
    encoder.encode = None  # type: ignore[assignment]
    (states, more), (plain, told) = encoder(["caption 7", ""]), other(["caption 7", ""])
    assert torch.equal(states, plain)  # type: ignore[arg-type]
    assert torch.equal(more["text_embeds"], told["text_embeds"])
    assert states[0].abs().sum() > 0 == states[1].abs().sum()  # type: ignore[union-attr, operator]
    assert losses(fast) == wanted


def test_a_run_resumes_with_or_without_its_cache(ready):
    run, folder = ready
    wanted = losses(run)
    run = replace(run, out=run.out.with_name("parted"), save_every=1)
    Trainer(cached(run, folder)).step(0)
    record = run.out / "run.json"
    assert recorded(record) == cached(run, folder)
    of = Model("cached", str(run.out), run, {})
    assert essence(recorded(record), of) == essence(run, of)
    Trainer(run)
    assert recorded(record) == run
    old = json.loads(record.read_text())
    del old["run"]["data"]["prepared"]  # as an earlier version wrote it
    record.write_text(json.dumps(old))
    assert recorded(record) == run
    assert losses(cached(run, folder)) == wanted[1:]


# What has changed


def changed(run: Run, folder: Path, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        Trainer(cached(run, folder))
    said = str(raised.value)
    assert said.startswith(f"{folder} was prepared with another ")
    assert f"run jdm prepare nano-controlnet --out {folder} again" in said
    assert "\n" not in said
    assert not run.out.exists()


@pytest.mark.hostile("checkpoints")
def test_an_edited_caption_is_noticed(ready, photos):
    (photos / "7.txt").write_text("caption seven")
    changed(*ready, message=r"another prompt .*\('caption seven' is new\)")


def test_two_captions_that_change_places_are_noticed(ready, photos):
    (photos / "7.txt").write_text("caption 8")
    (photos / "8.txt").write_text("caption 7")
    changed(*ready, message="another prompt than this run's; ")


def test_edits_of_equal_size_and_time_are_noticed(ready, photos):
    file = photos / "12.png"
    before = file.stat()
    pixels = np.array(Image.open(file))
    pixels[3, 4] ^= 1
    Image.fromarray(pixels).save(file, compress_level=0)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    changed(*ready, message=r"another picture .*\(12\.png\)")


def test_copied_or_touched_pictures_are_the_same(ready, photos, tmp_path):
    run, folder = ready
    for file in photos.iterdir():
        os.utime(file, (1, 1))
    shutil.copytree(photos, tmp_path / "elsewhere")
    for source in (photos, tmp_path / "elsewhere"):
        Trainer(cached(replace(run, data=replace(run.data, source=str(source)), out=tmp_path / source.name), folder))


def test_another_count_size_or_split_is_noticed(ready, photos):
    run, folder = ready
    for field, value, name in (("size", 64, r"size .*\(32 x 32, not 64 x 64\)"), ("split", "train[:5]", "split")):
        changed(replace(run, data=replace(run.data, **{field: value})), folder, f"another {name}")
    Image.new("RGB", (40, 40)).save(photos / "new.png")
    (photos / "new.txt").write_text("caption 7")
    changed(run, folder, r"another number of pictures .*\(26, not 27\)")


@pytest.mark.parametrize(("part", "message"), [("text_encoder", "text encoder"), ("vae", "autoencoder"),
                                               ("tokenizer", "tokenizer"), ("scaling_factor", "autoencoder")])
@pytest.mark.hostile("checkpoints")
def test_another_text_encoder_tokenizer_or_autoencoder_is_noticed(part, message, ready, tmp_path):
    run, folder = ready
    model = load_model(run.model)
    if part == "tokenizer":
        model.tokenizer.model_max_length = 15
    elif part == "scaling_factor":
        model.vae.register_to_config(scaling_factor=0.5)
    else:
        with torch.no_grad():
            list(model.modules()[part].parameters())[-1].view(-1)[0] += 1e-3
    other = save_pipeline(model, tmp_path / "other")
    changed(replace(run, model=str(other)), folder, f"another {message} than")


def test_a_cache_lacking_needed_latents_is_refused(ready, tmp_path):
    run, _ = ready
    prepare(small("nano-vae", run.out, Path(run.model), data=run.data), tmp_path / "without")
    with pytest.raises(UsageError, match="holds no latents, which this run's method needs; run jdm prepare"):
        Trainer(cached(run, tmp_path / "without"))


@pytest.mark.hostile("checkpoints")
def test_a_damaged_part_is_named(ready):
    run, folder = ready
    for part, cut in (("latents", 10_000), ("text", 50)):
        file = next(folder.glob(f"{part}-*")) / "0.npy"
        os.truncate(file, cut)
        with pytest.raises(UsageError, match=rf"{part}-\w+ is damaged .*; delete it, and run jdm prepare"):
            Trainer(cached(run, folder))
        shutil.rmtree(file.parent)
        prepare(run, folder, "nano-controlnet")
    assert losses(cached(run, folder))


# Making it


@pytest.mark.hostile("trouble")
def test_a_stopped_preparation_is_no_cache_but_resumes(ready, tmp_path, monkeypatch):
    run, whole = ready
    folder = tmp_path / "stopped"

    def stop(part: str, done: int, of: int) -> None:
        if part == "latents" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(run, folder, progress=stop)
    assert not list(folder.glob(".*.draft"))
    with pytest.raises(UsageError, match="holds no finished preparation; run jdm prepare"):
        Trainer(cached(run, folder))
    monkeypatch.setattr("jdm.models.text.TextEncoder.encode", None)  # the text states were whole and are not made again
    prepare(run, folder)
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    for file in folder.glob("*-*/*.npy"):
        assert file.read_bytes() == (whole / file.relative_to(folder)).read_bytes()


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file's bytes, but for the lock, which names its last holder."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != LOCK}


@pytest.mark.parametrize("full", ["part", "list", "manifest", "beforehand"])
@pytest.mark.hostile("trouble")
def test_a_full_disk_leaves_what_was_there(full, ready, photos, tmp_path, monkeypatch):
    run, folder = ready
    other = replace(run, data=replace(run.data, split="train[:9]"))
    before = contents(folder)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if full == "part":
        monkeypatch.setattr(writing.os, "fsync", refuse)
    elif full == "beforehand":
        usage = shutil.disk_usage(folder)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    else:
        chosen, replaced = {"list": "files-", "manifest": "manifest"}[full], Path.replace
        monkeypatch.setattr(Path, "replace", lambda a, b: refuse() if b.name.startswith(chosen) else replaced(a, b))
    for place in (folder, tmp_path / "new"):
        with pytest.raises(RunError, match=r"free some space,? or choose another --out"):
            prepare(other, place)
    monkeypatch.undo()
    assert contents(folder) == before
    assert not (tmp_path / "new").exists()
    Trainer(cached(run, folder))


def test_preparing_again_replaces_only_what_changed(ready, photos):
    run, folder = ready
    before = {p.name for p in folder.iterdir()}
    (photos / "7.txt").write_text("caption seven")
    prepare(run, folder)
    new = {p.name for p in folder.iterdir()} - before
    assert sorted(name.partition("-")[0] for name in new) == ["prompts", "text"]
    assert len(list(folder.iterdir())) == len(before)
    Trainer(cached(run, folder))


def test_splits_of_equal_length_are_told_apart(teacher, tmp_path):
    first, second = (small("nano-vae", tmp_path / "run", teacher, data=replace(tiny.DATA, split=split))
                     for split in ("test[:8]", "test[8:16]"))
    prepare(first, tmp_path / "cache")
    prepare(second, tmp_path / "cache")
    loaded = load_pictures("fashion-mnist", "test[8:16]", 32)
    read = pictures_of(cached(second, tmp_path / "cache"), loaded)
    assert torch.equal(read.batch(torch.arange(8)), loaded.batch(torch.arange(8)))


def test_files_of_other_programs_are_left_alone(ready, photos, tmp_path):
    run, folder = ready
    (folder / "text-notes.txt").write_text("mine")
    prepare(replace(run, data=replace(run.data, split="train[:9]")), folder)
    assert (folder / "text-notes.txt").read_text() == "mine"
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(UsageError, match=r"another program's manifest\.json; choose another --out"):
        prepare(run, tmp_path / "web")
    assert (tmp_path / "web" / "manifest.json").read_text() == '{"name": "a web page"}'


def test_a_second_process_or_rank_is_refused(ready, monkeypatch):
    run, folder = ready
    with (folder / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match=r"is in use by process .* wait for it to end"):
            prepare(run, folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="runs in one process; start it without torchrun"):
        prepare(run, folder)


def test_pictures_in_memory_differ_by_their_pixels(teacher):
    loaded = replace(load_pictures("fashion-mnist", "test[:8]", 32), files=None)
    other = replace(loaded, images=lambda rows: loaded.images(rows) ^ (rows == 3).to(torch.uint8).view(-1, 1, 1, 1))
    assert prepared.signs(loaded) == prepared.signs(loaded) != prepared.signs(other)


def test_the_command_prints_parts_and_the_next_command(teacher, tmp_path, capsys):
    flags = ["--model", str(teacher), "--data.split", "test[:8]", "--data.validation", "test[8:16]", "--steps", "1",
             "--batch", "2", "--probe-every", "0"]
    folder = str(tmp_path / "cache")
    assert main(["prepare", "nano-posterior", *flags, "--out", folder]) == 0
    *parts, command = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in parts] == ["latents", "pictures", "text", "in"]
    assert parts[1].split()[1:] == [f"{8 * 3 * 32 * 32 + 131:,}", "bytes"]  # a header of 128, {} and a line's end
    assert command.startswith("jdm train nano-posterior --model ")
    assert command.endswith(f" --data.prepared {folder}")
    assert main(["train", "nano-posterior", *flags, "--data.prepared", folder, "--out", str(tmp_path / "run")]) == 0
    assert main(["train", "nano-posterior", *flags, "--data.prepared", str(tmp_path)]) == 2
    assert "holds no finished preparation" in capsys.readouterr().err
