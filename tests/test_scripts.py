"""What the scripts have in common: bad input, help, dry runs, exit codes."""

import pytest

from ganomaly.config import FIELDS
from ganomaly.errors import guard

from .conftest import ROOT, benchmark_words, folder_of, train_words
from .outputs import contents, printed, refusal


def test_bad_input_is_one_line_that_names_it_and_a_hint(script, parts, tmp_path):
    empty, out = tmp_path / "empty", tmp_path / "out"
    (empty / "parts/train/good").mkdir(parents=True)
    text, a_file = tmp_path / "text.json", tmp_path / "file"
    text.write_bytes(b"\xff\xfe\x00")
    a_file.write_text("x")
    base = train_words(parts, out)
    model = ["--model", tmp_path / "none.pt", "--images", parts]
    table = [
        ("train", [*base, "--data-root", tmp_path / "nowhere"], "nowhere/parts/train/good"),
        ("train", [*base, "--steps", "x"], "--steps: invalid int value: 'x'"),
        ("train", [*base, "--config", text], "text.json: not a JSON config"),
        ("train", [*base, "--config", tmp_path / "none.json"], "none.json: No such file"),
        ("train", [*base, "--experiment", "../x"], "--experiment '../x'"),
        ("train", [*base, "--experiments-dir", a_file], str(a_file)),
        ("train", [*base, "--device", "cuda:99"], "--device cuda:99"),
        ("train", ["--recipe=calibratd"], "did you mean 'calibrated'?"),
        ("ablate", ["--recipe=qqq"], "known: calibrated, digits, mnist, paper"),
        ("benchmark", ["--recipe", "../x"], "no such recipe"),
        ("benchmark", ["--recipe=digits", "--categories", "3", "11"], "not 11"),
        ("benchmark", ["--dataset=mnist", "--data-root", empty, "--experiment=x"], "10 categories"),
        ("ablate", ["--categories", "bottle", "screw", "--data-root", empty],
         "data of 2 of 2 categories is missing (bottle, screw)"),
        ("report", ["--experiments-dir", out], "no finished run there"),
        ("predict", model, "none.pt: No such file"),
    ]  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    for name, words, expected in table:
        assert expected in refusal(script(name, *words)), words
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "scripts").glob("*.py")))
def test_help_fits_a_screen(script, capsys, name):
    with pytest.raises(SystemExit):
        script(name, "--help")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) - len(FIELDS) < 39  # a line a knob, and what stands around them


def test_what_a_restart_would_not_change_is_no_failure_to_a_launcher(script, parts, monkeypatch):
    for restarts, expected in (("3", [0, 0, 0, 130]), ("0", [0, 1, 2, 130])):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        assert [guard(lambda _, code=code: code) for code in (0, 1, 2, 130)] == expected
    monkeypatch.setenv("WORLD_SIZE", "2")  # as make benchmark WORKERS=2 ARGS=--force looks first
    assert "--force" in refusal(script("benchmark", "--data-root", parts, "--force", "--dry-run"))


def test_the_digits_are_the_default_and_need_nothing(script, tmp_path):
    flags = ["--steps=2", "--width=4", "--download"]
    assert printed(script("train", *flags)).startswith("0 seed 42: AUROC 0.")
    code, _, err = script("train", *flags, "--data-root", tmp_path, "--force")
    assert code == 0 and "the digits need no --data-root" in err


def test_a_dry_run_of_train_does_nothing(script, parts, finished, tmp_path):
    words = [*train_words(parts, tmp_path / "new"), "--dry-run"]
    out = printed(script("train", *words))
    assert f"would: {folder_of(tmp_path / 'new')}: train 6 steps" in out
    for name in ("local/mine", "new/local/mine", "new/local/mine/"):  # as a shell completes it
        out = printed(script("train", *words, "--experiment", name))
        assert f"would: {folder_of(tmp_path / 'new', name='local/mine')}: train 6 steps" in out
    assert '"latent_dim": 8' in out and not (tmp_path / "new").exists()
    assert "categories there: parts" in refusal(script("train", *words, "--category=prats"))
    words, before = [*train_words(parts, tmp_path), "--dry-run"], contents(finished)
    assert "finished, left alone" in printed(script("train", *words))
    assert "train 6 steps anew" in printed(script("train", *words, "--force"))
    (finished / "metrics.json").rename(tmp_path / "aside")
    assert "go on from its checkpoint" in printed(script("train", *words))
    (tmp_path / "aside").rename(finished / "metrics.json")
    assert contents(finished) == before


def test_a_dry_run_of_many_lists_them_and_those_that_would_be_refused(script, fifteen, tmp_path):
    words = benchmark_words(fifteen, tmp_path / "b", "--categories", "tile", "wood")
    assert printed(script("benchmark", *words, "--dry-run")).count("train 6 steps") == 2
    one = benchmark_words(fifteen, tmp_path / "b", "--category=tile", "--seed=7", "--dry-run")
    out = printed(script("benchmark", *one))  # as in train
    assert out.count("train 6 steps") == 1 and "tile/seed7: train" in out
    some = ["--seeds=1", "--only", "base", "no encoder loss"]
    assert printed(script("ablate", *words, *some, "--dry-run")).count("train 6 steps") == 4
    mnist = ["--dataset=mnist", "--data-root", tmp_path / "b", "--dry-run"]
    out = printed(script("benchmark", *mnist, "--download"))  # MNIST is what it would download
    assert out.count("train 11800 steps") == 10 and not list(tmp_path.iterdir())
    printed(script("benchmark", *words))
    config = folder_of(tmp_path / "b", "tile", name="all") / "config.json"
    config.write_text(config.read_text().replace('"width": 4', '"width": 5'))
    code, out, _ = script("benchmark", *words, "--dry-run")
    assert code == 1 and "finished, left alone" in out
    assert "tile seed 42: refused, " in out and "width (5 there, 4 asked)" in out
