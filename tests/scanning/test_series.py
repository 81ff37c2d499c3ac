"""Run and step from paths and manifests."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fadiag_fast.scanning import Entry, Pattern, SeriesError, read_manifest, series
from fadiag_fast.scanning.run_names import natural_key


@pytest.mark.parametrize(
    ("pattern", "path", "fields"),
    [
        ("{run}/step_{step}.pt", "runs/dfa/step_100.pt", {"run": "runs/dfa", "step": "100"}),
        ("{run}/step_{step}.pt", "dfa/step_100.pt", {"run": "dfa", "step": "100"}),
        ("{run}/step_{step}.pt", "step_100.pt", None),
        ("{run}/step_{step}.pt", "dfa/step_x.pt", None),
        ("{run}/step_{step}.pt", "dfa/my_step_1.pt", None),
        ("{run}/step_{step}.pt", "dfa/step_1.pt.tmp", None),
        ("{rule}_s{seed}/{step}.pt", "x/dfa_s42/7.pt", {"rule": "dfa", "seed": "42", "step": "7"}),
        ("{run}/*step={step}*.ckpt", "a/epoch=3-step=9-v1.ckpt", {"run": "a", "step": "9"}),
        ("{run}/checkpoint-{step}", "/abs/a/checkpoint-500", {"run": "/abs/a", "step": "500"}),
        ("{run}.{step}.pt", "a+(b).7.pt", {"run": "a+(b)", "step": "7"}),
    ],
)
def test_patterns(pattern, path, fields):
    assert Pattern(pattern).match(path) == fields


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("step.pt", "expected {run} or {step}"),
        ("{rule}/x.pt", "expected {run} or {step}"),
        ("{run}/{run}_{step}", "expected {run} once, got it 2 times"),
        ("{run}{step}.pt", "expected something between {run} and {step}"),
        ("{run/step_{step}.pt", "expected every { to have its }"),
        ("run}/step_{step}.pt", "expected every { to have its }"),
        ("{}/step_{step}.pt", "expected a name in braces"),
    ],
)
def test_bad_patterns(pattern, message):
    with pytest.raises(SeriesError) as error:
        series(["a.pt"], pattern)
    assert message in str(error.value)
    assert repr(pattern) in str(error.value)


def placed(*args, **kwargs):
    return [(e.run, e.step) for e in series(*args, **kwargs)]


def test_runs_are_named_from_what_tells_them_apart():
    paths = ["/d/runs/dfa/s42/step_9.pt", "/d/runs/dfa/s42/step_10.pt", "/d/runs/bp/s42/step_9.pt"]
    assert placed(paths) == [("bp/s42", 9), ("dfa/s42", 9), ("dfa/s42", 10)]
    assert placed(paths[:2]) == [("s42", 9), ("s42", 10)]
    assert placed(paths[:2], root="/d/runs") == [("dfa/s42", 9), ("dfa/s42", 10)]


def test_one_folder_by_two_names_is_one_run():
    assert placed(["a/step_1.pt", "./a/step_2.pt", "b/../a//step_3.pt", "c/step_1.pt"]) == [
        ("a", 1),
        ("a", 2),
        ("a", 3),
        ("c", 1),
    ]
    assert placed(["./runs/a/step_1.pt", "runs/b/step_1.pt"], root="./runs/") == [
        ("a", 1),
        ("b", 1),
    ]


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("a/checkpoint-0.91.pt", None),
        ("a/checkpoint_0.95.pt", None),
        ("a/epoch_3.5.pt", None),
        ("a/model_0.5.pt", None),
        ("a/model_1.2.3.pt", None),
        ("a/checkpoint_12.pth.tar", 12),
        ("a/model_7.safetensors", 7),
        ("a/step_100/model_2.pt", 100),
        ("a/step_100/ckpt_0.pt", 100),
        ("a/checkpoint-300/model-3.bin", 300),
    ],
)
def test_numbers_that_are_no_steps(path, step):
    assert [e.step for e in series([path])] == [step]


def test_fields_make_the_run_where_the_pattern_names_none():
    (entry,) = series(["x/dfa_s42/7.pt"], "{rule}_s{seed}/{step}.pt")
    assert (entry.run, entry.step, entry.fields) == ("dfa/42", 7, {"rule": "dfa", "seed": "42"})


def test_what_matches_nothing_is_kept_with_its_folder():
    entries = series(["a/step_1.pt", "a/last.pt", "alone.pt"], "{run}/step_{step}.pt")
    assert [(e.run, e.step, e.matched) for e in entries] == [
        (".", None, False),
        ("a", 1, True),
        ("a", None, False),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "step_5.pt",
        "step-5.ckpt",
        "step5.safetensors",
        "epoch=1-step=5.ckpt",
        "model_step_5.pt",
        "checkpoint-5",
        "checkpoint_5.pt",
        "epoch_5.pt",
        "epoch=5.ckpt",
        "step_5",
        "step_5/",
        "global_step5",
        "global_step5/",
        "checkpoint-5/",
        "checkpoint-5.pt",
        "checkpoint_5",
        "model_5.pt",
        "model-5.safetensors",
        "ckpt_5.pt",
        "ckpt-5.pth",
        "iter_5.pth",
        "iter_0000005.pth",
        "iter_0000005/",
        "epoch5.pt",
        "epoch-5.pt",
        "resnet50_epoch5.pth",
        "net_iter_5.pth",
        "model_step5.pt",
        "model-epoch=05-val_loss=0.31.ckpt",
        "epoch=05-val_loss=0.31.ckpt",
        "epoch=3-step=5.ckpt",
        "model-epoch=3-step=5-val_loss=0.31.ckpt",
        "model_epoch_3_step_5.pt",
        "step_5/model.pt",
        "step_5/epoch.pt",
        "checkpoint-5/model.safetensors",
        "global_step5/mp_rank_00_model_states.pt",
    ],
)
def test_usual_names_need_no_pattern(name):
    assert placed([f"a/{name}", f"b/{name}"]) == [("a", 5), ("b", 5)]
    assert placed([name]) == [(".", 5)]


@pytest.mark.parametrize(
    "name",
    [
        "resnet50.pt",
        "resnet_50.pt",
        "v2.pt",
        "model_v2.pt",
        "model2.pt",
        "model_0.5.pt",
        "ckpt-0.31.pt",
        "lr0.1.pt",
        "lr_0.1.pt",
        "seed_3.pt",
        "model-00001-of-00002.safetensors",
        "last.ckpt",
        "footstep_3.pt",
        "100.pt",
        "val_loss=0.31.ckpt",
    ],
)
def test_other_numbers_are_no_steps(name):
    entries = series([f"a/{name}", f"b/{name}"])
    assert [(e.run, e.step, e.matched) for e in entries] == [("a", None, False), ("b", None, False)]


def test_urls_and_repeated_paths():
    paths = ["s3://bucket/a/step_1.pt", "s3://bucket/b/step_1.pt", "s3://bucket/a/step_1.pt"]
    assert placed(paths) == [("a", 1), ("b", 1)]


@given(st.lists(st.integers(0, 10**30), max_size=6))
def test_numbers_sort_as_numbers(numbers):
    assert sorted((f"s{n}x" for n in numbers), key=natural_key) == [
        f"s{n}x" for n in sorted(numbers)
    ]


@given(st.lists(st.text(max_size=6)))
def test_any_names_can_be_sorted(names):
    keys = [natural_key(name) for name in names]
    assert len(sorted(keys)) == len(names)


def test_manifest_csv(tmp_path):
    file = tmp_path / "m.csv"
    file.write_text(
        "\ufeffpath,run,step,frozen_accuracy,frozen_run,seed\n"
        "a/step_10.pt,dfa,10,0.35,,42\n"
        "/abs/x.pt,dfa,9.0,,frozen,\n"
        "s3://b/x.pt,,,,,\n",
        encoding="utf-8",
    )
    assert read_manifest(file) == [
        Entry("s3://b/x.pt", "b", None),
        Entry("/abs/x.pt", "dfa", 9, {}, None, None, "frozen"),
        Entry(str(tmp_path / "a/step_10.pt"), "dfa", 10, {"seed": "42"}, None, 0.35),
    ]


def test_blanks_around_a_manifests_names_and_values_count_for_nothing(tmp_path):
    file = tmp_path / "m.csv"
    file.write_text(
        'path , step, run ,note, accuracy\na.pt, 10 , dfa,"x, y" , 0.5\n"b, c.pt" ,11,dfa, ,\n'
    )
    assert read_manifest(file) == [
        Entry(str(tmp_path / "a.pt"), "dfa", 10, {"note": "x, y"}, 0.5),
        Entry(str(tmp_path / "b, c.pt"), "dfa", 11),
    ]


def test_manifest_toml(tmp_path):
    pytest.importorskip("tomllib", reason="needs Python 3.11")
    file = tmp_path / "m.toml"
    file.write_text(
        '[runs.dfa]\nfrozen_accuracy = 0.35\n[[checkpoint]]\npath = "a.pt"\nrun = "dfa"\nstep = 3\n'
        'note = "warm"\n[[checkpoint]]\npath = "b.pt"\n'
    )
    entries = read_manifest(file)
    assert [(e.run, e.step, e.frozen_accuracy, e.fields) for e in entries if e.run == "dfa"] == [
        ("dfa", 3, 0.35, {"note": "warm"})
    ]
    assert len(entries) == 2


def test_manifest_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'scan'")
    from pyarrow import parquet

    columns = {"path": ["a.pt", "b.pt"], "run": ["r", "r"], "step": [1.0, math.nan]}
    parquet.write_table(pa.table(columns), tmp_path / "m.parquet")
    assert [(e.run, e.step) for e in read_manifest(tmp_path / "m.parquet")] == [
        ("r", 1),
        ("r", None),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "file,run\na,b\n", "expected a column 'path', got file, run"),
        ("m.csv", "", "got an empty file"),
        ("m.csv", "path,step\na.pt,x\n", "line 2: step: expected a whole number, got 'x'"),
        ("m.csv", "path,step\na.pt,1.5\n", "line 2: step: expected a whole number, got '1.5'"),
        ("m.csv", "path,step\na.pt,inf\n", "step: expected a whole number"),
        ("m.csv", "path,frozen_accuracy\na.pt,35\n", "expected a fraction from 0 to 1, got '35'"),
        ("m.csv", "path,accuracy\na.pt,high\n", "accuracy: expected a fraction"),
        ("m.csv", "path, step\na.pt, x\n", "line 2: step: expected a whole number, got 'x'"),
        ("m.csv", "path, step\na.pt, 1\nb.pt, ten\n", "line 3: step: expected a whole number"),
        ("m.csv", f"path,step\na.pt,{10**30}\n", "line 2: step: expected a whole number"),
        ("m.csv", "Path, step\na.pt, 1\n", "expected a column 'path', got Path, step"),
        ("m.csv", "path,step, step\na.pt,1,2\n", "expected one column 'step', got several"),
        ("m.csv", "path,run\n,b\n", "line 2: expected a path"),
        ("m.csv", "path\na.pt\na.pt\n", "line 3: "),
        ("m.csv", "path\na.pt,b\n", "expected 1 cells like the header, got more"),
        ("m.toml", "x = ", "expected a TOML file"),
        ("m.toml", "x = 1", "expected [[checkpoint]] tables"),
        ("m.toml", '[[checkpoint]]\npath = "a"\nstep = true', "step: expected a whole number"),
        ("m.parquet", "x", "expected a Parquet file"),
        ("m.json", "{}", "expected a .csv, .parquet or .toml file"),
    ],
)
def test_bad_manifests(tmp_path, name, text, message):
    if name.endswith("toml"):
        pytest.importorskip("tomllib", reason="needs Python 3.11")
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="needs the extra 'scan'")
    (tmp_path / name).write_text(text)
    with pytest.raises(SeriesError) as error:
        read_manifest(tmp_path / name)
    assert message in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_a_manifest_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_manifest(tmp_path / "m.csv")
