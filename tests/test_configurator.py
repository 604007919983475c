import pytest

from plumbing.configurator import configure, describe, read_defaults

SCRIPT = '''"""Run me."""
import math
# ---- first group
out_dir = "out"  # where to write
rate = 1e-3  # a float
count = -1
flag = True
# ---- second group
limit: int | None = None  # optional
# ----
config = configure(globals())
hidden = 5
'''
DEFAULTS = dict(out_dir="out", rate=1e-3, count=-1, flag=True, limit=None)


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return {"__file__": str(tmp_path / "script.py"), "__doc__": "Run me.", "tmp": tmp_path}


def test_defaults_are_the_block_and_nothing_else():
    defaults = read_defaults(SCRIPT)
    assert {key: value for key, (value, _) in defaults.items()} == DEFAULTS
    assert defaults["limit"] == (None, ["int", "None"])


def test_values_keep_their_types(script):
    argv = ["--out_dir=a=b c", "--rate=2", "--count=-7", "--flag=False", "--limit=3"]
    config = configure(script, argv)
    assert config == dict(out_dir="a=b c", rate=2.0, count=-7, flag=False, limit=3)
    assert type(config["rate"]) is float
    assert script["count"] == -7
    config = configure(script, ["--limit=3", "--limit=None", "--out_dir=None"])
    assert config == DEFAULTS | dict(out_dir="None")


def test_files_and_flags_apply_in_order(script, tmp_path, monkeypatch):
    rate = "rate = int(math.sqrt(4))  # int for a float"
    (tmp_path / "c.py").write_text(f"import math\n{rate}\ncount = 3\n_private = 1\n")
    assert configure(script, ["--count=9", str(tmp_path / "c.py"), "--flag=False"])["count"] == 3
    monkeypatch.chdir("/")  # a path relative to the script's folder works from anywhere
    assert configure(script, ["c.py", "--count=4"]) == DEFAULTS | dict(rate=2.0, count=4)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--rte=1"], ["'rte'", "did you mean 'rate'"]),
        (["--count=1.5"], ["count takes int, not 1.5"]),
        (["--count=many"], ["count takes int, not 'many'"]),
        (["--rate=nan"], ["rate takes float, not 'nan'"]),
        (["--flag=yes"], ["flag takes bool"]),
        (["--flag=1"], ["flag takes bool"]),
        (["--count=None"], ["count takes int"]),
        (["--hidden=1"], ["unknown setting"]),
        (["--out_dir="], ["out_dir is empty"]),
        (["--count", "3"], ["--key=value"]),
        (["-count=3"], ["--key=value"]),
        (["nowhere.py"], ["no config file 'nowhere.py'"]),
        (["bad_key.py"], ["unknown setting 'cuont'", "'count'"]),
        (["bad_type.py"], ["count takes int, not True"]),
        (["broken.py"], ["SyntaxError"]),
    ],
)
def test_mistakes_are_named(script, argv, words):
    (script["tmp"] / "bad_key.py").write_text("cuont = 1\n")
    (script["tmp"] / "bad_type.py").write_text("count = True\n")
    (script["tmp"] / "broken.py").write_text("count = = 1\n")
    with pytest.raises(SystemExit) as e:
        configure(script, argv)
    message = e.value.code
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_help_prints_the_block(script, capsys):
    with pytest.raises(SystemExit) as e:
        configure(script, ["--help"])
    text = capsys.readouterr().out
    assert not e.value.code
    assert text.startswith("Run me.")
    assert '# ---- first group\nout_dir = "out"  # where to write' in text
    assert text.rstrip().endswith("limit: int | None = None  # optional")


def test_describes_what_differs_from_the_defaults(script):
    config = configure(script, ["--rate=0.5", "--limit=3", "--count=-1"])
    assert describe(config, script["__file__"]) == "--rate=0.5 --limit=3"
    assert describe(configure(script, []), script["__file__"]) == "all settings are the defaults"
