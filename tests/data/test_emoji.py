"""The emoji data set: packages, things and their splits, captions, drawings, and the shards made of them."""

import base64
import io
import json
import random
import tarfile
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageDraw

from jdm.data.emoji import making
from jdm.data.emoji.captions import captions
from jdm.data.emoji.classes import GROUPS as CLASS_GROUPS
from jdm.data.emoji.classes import STYLES as CLASS_STYLES
from jdm.data.emoji.classes import classes_of
from jdm.data.emoji.drawings import drawings, may_be_mirrored, vectors
from jdm.data.emoji.packages import LICENCES, NAMES, STYLES, notice
from jdm.data.emoji.things import Emoji, all_emoji, joined, normalised, split_of
from jdm.data.sources import PACKAGED_EMOJI, load_pictures
from jdm.errors import UsageError
from registries import pinned, registry, tarball

FOX = Emoji("1f98a", "fox", "animals & nature", "animal mammal", "fox")
GROUPS = ["smileys & emotion", "people & body", "components", "animals & nature", "objects", "symbols", "flags"]
MESSAGES = json.dumps({"groups": [{"order": i, "message": g} for i, g in enumerate(GROUPS)],
                       "subgroups": [{"order": 0, "key": "some-kind"}]})


def read(*labelled, group="objects", skins=()):
    """Emoji of one group from (code, label) pairs; `skins` belong to the first."""
    entries = [{"hexcode": c, "label": n, "group": GROUPS.index(group), "subgroup": 0} for c, n in labelled]
    entries[0]["skins"] = [{"hexcode": c, "label": n} for c, n in skins]
    return all_emoji(json.dumps(entries), MESSAGES)


def things(*labelled, **more):
    return {one.thing for one in read(*labelled, **more).values()}


@pytest.fixture(autouse=True)
def configured_registry(monkeypatch):
    monkeypatch.setenv("npm_config_registry", "https://mirror.example/npm/")


# Packages


def test_every_package_is_pinned_by_a_sha512():
    assert {len(base64.b64decode(p.sha512)) for p in (*STYLES, NAMES)} == {64}
    assert len({p.style for p in STYLES}) == len(STYLES) == 6


def test_notice_names_every_author_and_licence():
    text = notice()
    assert all(p.author in text and p.home in text and p.licence in text for p in (*STYLES, NAMES))
    assert all(file.read_text() in text for file in LICENCES.iterdir())
    assert {p.licence for p in (*STYLES, NAMES)} <= {f.stem for f in LICENCES.iterdir()} | {"CC-BY-4.0"}


# Things


def test_variants_of_a_person_are_one_thing():
    fighters = [("1F9D1-200D-1F692", "firefighter"), ("1F468-200D-1F692", "man firefighter"),
                ("1F469-200D-1F692", "woman firefighter")]
    skins = [("1F9D1-1F3FB-200D-1F692", "firefighter: light skin tone")]
    assert len(things(*fighters, group="people & body", skins=skins)) == 1
    runners = [("1F3C3", "person running"), ("1F3C3-200D-2640-FE0F", "woman running"),
               ("1F3C3-200D-27A1-FE0F", "person running facing right")]
    assert len(things(*runners, group="people & body")) == 1
    assert len(things(fighters[0], runners[0], group="people & body")) == 2


def test_series_and_colours_are_one_thing():
    assert things(("1F550", "one o’clock"), ("1F55C", "one-thirty")) == {"clock"}
    assert things(("2764", "red heart"), ("1F499", "blue heart"), group="smileys & emotion") == {"heart"}
    assert things(("1F4D7", "green book"), ("1F4D9", "orange book")) == {"book"}
    assert things(("1F408", "cat"), ("1F431", "cat face"), ("1F408-200D-2B1B", "black cat"),
                  group="animals & nature") == {"cat"}
    assert things(("1F3F9", "bow and arrow")) == {"bow and arrow"}


def test_flags_stay_apart_and_components_go():
    assert len(things(("1F1F3-1F1F4", "flag: Norway"), ("1F1F8-1F1EA", "flag: Sweden"), group="flags")) == 2
    assert read(("1F3FB", "light skin tone"), group="components") == {}


def test_codes_are_spelled_one_way():
    assert normalised("0031-FE0F-20E3") == normalised("31-20e3") == "31-20e3"
    assert normalised("1f3f4-e0067_e007f") == "1f3f4-e0067-e007f"


def test_joined_things_share_a_split():
    groups = joined("abcdef", [("a", "b"), ("c", "b"), ("e", "f")])
    assert groups == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "e", "f": "e"}


def test_two_peoples_skin_tones_make_no_other_thing():
    ears = [("1F46F", "people with bunny ears"), ("1F9D1-1F3FB-200D-1F430-200D-1F9D1-1F3FC", "people with bunny ears")]
    assert things(*ears, group="people & body") == {"1f46f"}
    kiss = [("1F48F", "kiss"), ("1F9D1-200D-2764-FE0F-200D-1F48B-200D-1F9D1", "kiss: person, person")]
    assert things(*kiss, group="people & body") == {"1f48f"}


def test_three_of_twenty_things_are_held_out():
    splits = [split_of(f"thing {i}", 6) for i in range(4000)]
    shares = [splits.count(split) / 4000 for split in ("train", "validation", "test")]
    assert {split_of(f"thing {i}", 121) for i in range(40)} == {"train"}
    assert shares == pytest.approx([0.85, 0.05, 0.1], abs=0.015)  # a hash decides each


# Captions and drawings


def test_captions_vary_and_drop_name_or_style():
    said = captions(FOX, "flat")
    assert len(set(said)) == len(said) == 12
    assert "fox, flat style" in said
    assert "a flat emoji of a fox" in said
    assert sum("fox" not in c for c in said) == 2
    assert sum("flat" not in c for c in said) == 3


@pytest.mark.parametrize(("name", "group", "with_article"), [
    ("owl", "animals & nature", "an owl"), ("unicorn", "animals & nature", "a unicorn"),
    ("chopsticks", "food & drink", "chopsticks"), ("Mount Fuji", "travel & places", "Mount Fuji"),
    ("compass", "objects", "a compass"), ("red heart", "smileys & emotion", "red heart")])
def test_article_fits_the_name(name, group, with_article):
    assert f"an emoji of {with_article}" in captions(replace(FOX, name=name, group=group), "flat")


def test_names_are_plain_words():
    found = read(("1F1F3-1F1F4", "flag: Norway"), ("1F19A", "keycap: 1"), group="flags")
    assert [one.name for one in found.values()] == ["flag of Norway", "keycap, 1"]


def test_letters_and_sides_are_never_mirrored():
    assert may_be_mirrored(FOX)
    assert not may_be_mirrored(replace(FOX, group="symbols"))
    assert not may_be_mirrored(replace(FOX, name="left-facing fist", group="people & body"))
    assert may_be_mirrored(replace(FOX, group="smileys & emotion", kind="face smiling"))


def picture(seed, side=64):
    """A WebP of a few random discs."""
    chance, out = random.Random(seed), io.BytesIO()
    image = Image.new("RGBA", (side, side))
    for _ in range(4):
        x, y, r = (chance.randrange(side // 4, 3 * side // 4) for _ in range(3))
        ImageDraw.Draw(image).ellipse((x - r // 2, y - r // 2, x + r // 2, y + r // 2),
                                      fill=tuple(chance.randrange(200) for _ in range(3)))
    image.save(out, "WEBP", lossless=True)
    return out.getvalue()


def test_first_drawing_is_plain_and_others_move():
    made, thumbnail = drawings(FOX, "3d", picture(1), 64, 3)
    images = [Image.open(io.BytesIO(data)) for data in made]
    assert {image.size for image in images} == {(64, 64)}
    assert images[0].getpixel((0, 0)) == (255, 255, 255)
    assert len({image.tobytes() for image in images}) == 3
    assert len(thumbnail) == 16 * 16 * 3
    assert drawings(FOX, "3d", picture(1), 64, 3)[0] == made


def test_vectors_follow_aliases_and_mirror_them():
    pytest.importorskip("resvg_py")
    icons = {"icons": {"left": {"body": '<path d="M0 0h8v16H0z"/>'}},
             "aliases": {"right": {"parent": "left", "hFlip": True}}, "width": 16, "height": 16}
    svgs = vectors({"icons.json": json.dumps(icons).encode(), "chars.json": b'{"1f448": "left"}'}, {"right": "1f449"})
    left, right = (Image.open(io.BytesIO(drawings(FOX, "flat", svgs[c], 32, 1)[0][0])) for c in ("1f448", "1f449"))
    assert (left.getpixel((8, 16)), left.getpixel((24, 16))) == ((0, 0, 0), (255, 255, 255))
    assert right.tobytes() == left.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()


# The whole


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A data set of 60 things in one style; thing 7 looks like thing 3."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(making, "PER_SHARD", 50)
    labelled = [{"hexcode": f"1F{i:03X}", "label": f"thing {i}", "group": 4, "subgroup": 0} for i in range(60)]
    names = tarball({"en/data.json": json.dumps(labelled).encode(), "en/messages.json": MESSAGES.encode()})
    style = tarball({f"assets/1f{i:03x}.webp": picture(3 if i == 7 else i) for i in range(60)})
    out = tmp_path / "emoji"
    packages = [pinned(STYLES[0], style)]
    get = registry(**{NAMES.name: names, "@lobehub%2Ffluent-emoji-3d": style})
    return out, making.make(out, 32, 2, lambda *_: None, get, packages, pinned(NAMES, names))


def test_shards_load_by_split_with_several_captions(made):
    out, summary = made
    sizes = {split: len(load_pictures(str(out), split, 32)) for split in ("train", "validation", "test")}
    counted = {split: said["pictures"] for split, said in summary["splits"].items()}
    assert sizes == counted | {"train": 2 * counted["train"]}
    assert sum(counted.values()) == 60
    assert len(list(out.glob("train-*.tar"))) == 3
    pictures = load_pictures(str(out), "train", 32)
    assert {len(each) for each in pictures.captions} == {12}
    assert (out / "NOTICE.txt").read_text() == notice()
    assert json.loads((out / "data.json").read_text()) == json.loads(json.dumps(summary))


def test_splits_share_no_thing_and_lookalikes_join(made):
    out, summary = made
    seen = {}
    for file in out.glob("*.tar"):
        with tarfile.open(file) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    said = json.load(tar.extractfile(member))
                    seen.setdefault(said["thing"], set()).add(file.name.split("-")[0])
                    assert said["group"] == "objects"
    assert len(seen) == 60
    assert {len(splits) for splits in seen.values()} == {1}
    assert summary["joined_things"] == [["thing 3", "thing 7"]]
    assert seen["thing 3"] == seen["thing 7"]


def test_folder_with_shards_is_not_overwritten(made):
    with pytest.raises(UsageError, match="holds shards already; remove them or name another folder"):
        making.make(made[0], 32, 1, lambda *_: None)


def test_missing_emoji_name_their_command(tmp_path, monkeypatch):
    monkeypatch.setenv("EMOJI", str(tmp_path))
    with pytest.raises(UsageError, match=r"train pictures are not in .*make them there with: jdm data emoji"):
        load_pictures("emoji", "train", 64)


def test_shipped_test_split_is_small_and_licensed(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    (shard,) = PACKAGED_EMOJI.glob("*.tar")
    assert shard.stat().st_size <= 8_000_000
    assert (PACKAGED_EMOJI / "NOTICE.txt").read_text() == notice()
    pictures = load_pictures("emoji", "test", 64)
    assert len(pictures) == len(pictures.captions) == 1383
    assert pictures.batch(torch.arange(4)).shape == (4, 3, 64, 64)
    asked = {texts[0].rsplit(", ", 1)[1] for texts in pictures.captions}
    assert asked == {f"{package.style} style" for package in STYLES}


def test_classes_are_the_shards_style_and_group():
    said = []
    with tarfile.open(PACKAGED_EMOJI / "test-000.tar") as tar:
        for member in tar:
            if member.name.endswith(".json"):
                facts = json.load(tar.extractfile(member))
                said.append(list(CLASS_STYLES).index(facts["style"]) * 9 + list(CLASS_GROUPS).index(facts["group"]))
    pictures = load_pictures("emoji", "test", 64)
    assert pictures.label(torch.arange(len(pictures))).tolist() == said
    assert len(set(said)) > 40


def test_held_out_emoji_are_asked_by_both():
    pictures = load_pictures("emoji", "test", 64)
    rows = torch.arange(len(pictures))
    styles = [CLASS_STYLES[label // 9] for label in pictures.label(rows).tolist()]
    for uniform in (torch.zeros(len(rows)), torch.full((len(rows),), 0.999)):
        assert all(style in prompt for style, prompt in zip(styles, pictures.prompts(rows, uniform), strict=True))


def test_emoji_of_an_unknown_subgroup_have_no_classes():
    assert classes_of([("fox, 3d style", "animal alien, 3d style", "3d style")]) is None
    assert classes_of([("a fox",)]) is None
