import json
import shutil

import pytest
import torch
from tqdm import tqdm

from ganomaly import config as configuration
from ganomaly.cli import Parser, given_values
from ganomaly.config import DATASET_DEFAULTS, FIELDS, Config, from_json, load_config, resolve
from ganomaly.errors import UserError
from ganomaly.runs import pipeline
from ganomaly.runs.run import Recorder, Run

from .conftest import CHANGES, CPU, ROOT, TINY, committed, draw_category
from .outputs import numbers


def parsed(*words: str) -> Config:
    parser = Parser("test")
    parser.add_config_flags()
    return resolve(given_values(parser.parse_args(list(words))))


def test_the_paper_recipe_is_the_defaults_and_no_recipe_fixes_the_precision():
    recipe = load_config(ROOT / "experiments/paper/config.json")
    assert recipe == Config(checkpoint_every=250)  # more checkpoints, for its curves
    # A CPU without bf16 emulates it, and would take 14 to 25 times as long as in fp32
    recipes = [load_config(path) for path in committed(":(glob)experiments/*/config.json")]
    assert {recipe.amp for recipe in recipes} == {"auto"}


def test_every_committed_recipe_and_run_config_is_complete_and_loads():
    assert (found := [path for path in committed("experiments") if path.name == "config.json"])
    paper = json.loads((ROOT / "experiments/paper/config.json").read_text())
    for path in found:
        # Every knob that there was; one that came later has its default there
        written = json.loads(path.read_text())
        assert written.keys() == paper.keys() <= FIELDS.keys(), path
        assert written.items() <= vars(load_config(path)).items()


def test_dataset_follows_from_the_category_and_its_defaults_give_way_to_flags():
    assert parsed().dataset == "digits"
    assert parsed("--category", "bottle").dataset == "mvtec"
    for dataset, defaults in DATASET_DEFAULTS.items():
        assert vars(parsed("--dataset", dataset)).items() >= defaults.items()
        assert parsed("--dataset", dataset, "--image-size", "64").image_size == 64


def test_flags_override_a_config_file_and_another_dataset_brings_its_own_defaults(tmp_path):
    path = tmp_path / "saved.json"
    path.write_text(Config(category="bottle", steps=10, width=8, lr=1e-3, tta=True).to_json())
    config = parsed("--config", str(path), "--steps", "20", "--no-tta")
    assert (config.steps, config.width, config.category, config.tta) == (20, 8, "bottle", False)
    config = parsed("--config", str(path), "--dataset", "mnist", "--category", "3")
    assert (config.image_size, config.channels, config.steps) == (32, 1, 11_800)
    assert config.lr == 1e-3 and config.category == "3"
    digits = str(ROOT / "experiments/digits/config.json")
    config = parsed("--config", digits, "--dataset", "folder", "--width", "8")
    assert (config.width, config.channels, config.category) == (8, 1, None)


def test_every_field_is_a_flag():
    for name, field in FIELDS.items():
        flag = "--" + name.replace("_", "-")
        needed = ["--corrupted=.9"] if name == "comparator_width" else []
        value = [] if CHANGES[name] is True else [str(CHANGES[name])]  # a bool's flag stands alone
        changed = getattr(parsed(flag, *value, *needed), name)
        assert changed == CHANGES[name] and changed != getattr(parsed(), name)
        assert type(changed) is type(field.default) or name == "category"


def test_every_config_field_has_an_effect(parts, tmp_path, monkeypatch):
    assert CHANGES.keys() == FIELDS.keys()
    shutil.copytree(parts / "parts", tmp_path / "images" / "parts")
    draw_category(tmp_path / "images" / "7", seed=1)
    base = Config(dataset="folder", category="parts", **TINY)
    saved, threads = [], []
    real = Recorder.save
    monkeypatch.setattr(Recorder, "save", lambda *a: saved.append(a[1]["step"]) or real(*a))
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    def results(name, config):
        saved.clear()
        threads.clear()
        setting = pipeline.Setting(tmp_path / "images", CPU)
        pipeline.run_one(config, tmp_path / name, setting, tqdm(disable=True))
        metrics, scores = numbers(Run(tmp_path / name, config.category, config).folder)
        for echoed in ("category", "dataset", "seed", "score"):
            del metrics[echoed]
        return metrics, scores, list(saved), list(threads)

    expected = results("base", base)
    for name, value in {**CHANGES, "channels": 1}.items():
        more = {"category": "3", "dataset": "digits"} if name == "dataset" else {name: value}
        needs = dict(corrupted=0.5) if name.startswith("comparator") else {}
        needs |= dict(comparator_width=3) if name == "comparator_noise" else {}
        start = results(f"before {name}", base.replace(**needs)) if needs else expected
        assert results(name, base.replace(**needs, **more)) != start, f"{name} changes nothing"
    assert results("again", base) == expected  # so that the differences above mean something


REFUSED = [  # for each kind of limit and of type a value beyond it
    ("steps", 0, "at least 1"),
    ("steps", True, "whole number"),
    ("steps", "5", "whole number"),
    ("image_size", 48, "32, 64"),
    ("width", 2048, "at most 1024"),
    ("channels", 2, "1, 3"),
    ("lr", 10**400, "more than 0"),
    ("lr", float("nan"), "more than 0"),
    ("lr", 0, "more than 0"),
    ("beta1", 1, "less than 1"),
    ("score", "best", "latent"),
    ("dataset", {"a": 1}, "mvtec"),
    ("category", "../x", "folder name"),
    ("category", "..", "folder name"),
    ("category", 3, "text"),
    ("tta", 1, "true or false"),
]


@pytest.mark.parametrize("name, value, allowed", REFUSED)
def test_an_impossible_value_names_key_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(UserError) as error:
        from_json(json.dumps({name: value}), "saved.json")
    text = str(error.value)
    assert text.startswith("saved.json: ") and name in text and allowed in text
    assert "\n" not in text


def test_images_in_folders_are_one_kind_whichever_name_the_data_set_has():
    ours, theirs = (Config(dataset=name, category="bottle") for name in ("mvtec", "folder"))
    mnist, differences = theirs.replace(dataset="mnist"), configuration.differences
    assert differences(ours, theirs) == []
    assert differences(ours, mnist) == ["dataset (mnist there, mvtec asked)"]


def test_what_is_no_config_is_named_and_an_unknown_key_with_the_nearest():
    for text in ("[1]", "{"):
        with pytest.raises(UserError, match=r"^saved\.json: "):
            from_json(text, "saved.json")
    with pytest.raises(UserError, match="'stepz'; did you mean 'steps'"):
        from_json('{"stepz": 5}')
    with pytest.raises(UserError, match="unrecognized arguments: --step 5; --help"):
        parsed("--step", "5")  # no abbreviations either


def test_knobs_that_do_not_fit_together_are_refused():
    for values, words in (
        (dict(comparator_width=8, corrupted=0.05), "comparator_width: no image of a batch"),
        (dict(score="comparator", corrupted=0.5), "score: comparator needs"),
        (dict(w_adv=0, w_con=0, w_enc=0), "w_adv, w_con, w_enc.*: all are 0"),
    ):
        with pytest.raises(UserError, match=words):
            Config(**values)
    assert [Config(corrupted=c).n_corrupted for c in (0.0, 0.5, 0.999)] == [0, 8, 15]
