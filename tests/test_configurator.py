import subprocess
import sys

import pytest

from conftest import ROOT, refused
from plumbing.configurator import configure, configure_paths, describe, read_defaults

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


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--flag=false"], dict(flag=False)),
        (["--flag=TRUE", "--limit=none"], dict(flag=True, limit=None)),
        (["--count=4.0", "--rate=1E-2"], dict(count=4, rate=0.01)),
        (["--count=1e3", "--limit=7.0"], dict(count=1000, limit=7)),
        (["--count", "-7", "--flag", "false", "--rate", "3"], dict(count=-7, flag=False, rate=3.0)),
        (["--out_dir", "None", "--limit", "3"], dict(out_dir="None", limit=3)),
        (["--out_dir", "a=b"], dict(out_dir="a=b")),
        (["c.py", "--count", "4", "c.py"], dict(count=3)),
    ],
)
def test_what_sweep_tools_write(script, tmp_path, monkeypatch, argv, expected):
    """Other words for a bool, whole floats, and a space for the equals sign."""
    (tmp_path / "c.py").write_text("count = 3.0\n")
    monkeypatch.chdir(tmp_path)
    config = configure(script, argv)
    assert config == DEFAULTS | expected
    assert [type(config[key]) for key in expected] == [type(v) for v in expected.values()]


def test_paths_stand_beside_flags(script, monkeypatch):
    argv = ["script.py", "a.npy", "--count", "4", "out_dir", "rate", "--flag=false", "b/c.npy"]
    monkeypatch.setattr(sys, "argv", argv)
    config, paths = configure_paths(script)
    assert config == DEFAULTS | dict(count=4, flag=False)
    assert paths == ["a.npy", "out_dir", "rate", "b/c.npy"]


@pytest.mark.parametrize("script", ["prepare.py", "train.py", "sample.py"])
def test_other_systems_get_a_line(script):
    windows = """
import sys, torch, tqdm
sys.platform = "win32"
sys.modules |= dict(fcntl=None, resource=None)
"""
    words = refused(script, "--help", patch=windows, fork=False)
    assert words == "error: this runs on Linux and macOS; on Windows use WSL"


@pytest.mark.parametrize("stdout, words", [(">/dev/full", "No space left"), ("| true", "pipe")])
@pytest.mark.parametrize("length", [1, 100_000])
@pytest.mark.parametrize("option", ["-u", "-s"])
def test_help_that_nobody_takes(stdout, words, length, option):
    """One line, buffered or not, and no complaint of Python's own as it ends."""
    namespace = f"dict(__doc__={length} * 'Run me.', __file__='report/score.py')"
    code = "import time; time.sleep(0.2); from plumbing import configurator; "
    code += f"configurator.set_up_console(); configurator.configure({namespace}, ['--help'])"
    command = ["sh", "-c", f'"$0" {option} -c "$1" {stdout}', sys.executable, code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "" and done.stderr.startswith("WARNING: cannot print: ")
    assert words in done.stderr and done.stderr.count("\n") == 1


def test_help_without_any_output():
    code = "from plumbing import configurator; configurator.set_up_console(); namespace = "
    code += "dict(__doc__='Run me.', __file__='report/score.py'); "
    code += "configurator.configure(namespace, ['--help'])"
    command = ["sh", "-c", '"$0" -c "$1" >&-', sys.executable, code]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_files_and_flags_apply_in_order(script, tmp_path, monkeypatch):
    rate = "rate = int(math.sqrt(4))  # int for a float"
    (tmp_path / "c.py").write_text(f"import math\n{rate}\ncount = 3\n_private = 1\n")
    assert configure(script, ["--count=9", str(tmp_path / "c.py"), "--flag=False"])["count"] == 3
    monkeypatch.chdir(tmp_path)
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
        (["--foo=1"], ["unknown setting 'foo'", "--help prints all"]),
        (["--rte", "1"], ["'rte'", "did you mean 'rate'"]),
        (["--count"], ["'--count'", "--key=value"]),
        (["--out_dir", "--count=3"], ["'--out_dir'", "--key=value"]),
        (["--count", "many"], ["count takes int, not 'many'"]),
        (["--count=1e999"], ["count takes int, not inf"]),
        (["--count={[]:1}"], ["count takes int"]),
        (["-count=3"], ["--key=value"]),
        (["nowhere.py"], ["config file nowhere.py failed: FileNotFoundError: ", "--key=value"]),
        (["bad_key.py"], ["unknown setting 'cuont'", "'count'"]),
        (["bad_type.py"], ["count takes int, not True"]),
        (["broken.py"], ["SyntaxError"]),
    ],
)
def test_mistakes_are_named(script, monkeypatch, argv, words):
    monkeypatch.chdir(script["tmp"])
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


def test_a_home_folder_is_expanded_wherever_it_stands(script, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "c.py").write_text("out_dir = '~/x'\n")
    assert configure(script, ["--out_dir=~/x"])["out_dir"] == "/home/me/x"
    assert configure(script, [str(tmp_path / "c.py")])["out_dir"] == "/home/me/x"
