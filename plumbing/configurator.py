"""
Override a script's defaults from python files and --key=value flags.

    python train.py config/train_digits.py --batch_size=32 --learning_rate=1e-3
    python train.py --help

A script keeps its defaults as plain assignments under `# ---- group` headings, up to a line
`# ----`, and then calls `config = configure(globals())`. Files and flags apply in the order given;
the last one wins. A key that the script does not know, or a value of another type, ends the run
with one line.
"""

import ast
import difflib
import math
import os
import re
import sys
import textwrap
from pathlib import Path


def configure(namespace, argv=None):
    """Apply config files and flags to a script's globals.

    namespace: the script's `globals()`, with the block of defaults and `__file__`
    argv: the arguments after the script's name; sys.argv[1:] by default
    Returns {key: value} of every setting, in the order of the block.
    Exits with one line and code 1 on an unknown key, a wrong type or an unreadable file.
    """
    script = Path(namespace["__file__"]).resolve()
    source = script.read_text()
    defaults = read_defaults(source)
    config = {key: value for key, (value, _) in defaults.items()}
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(namespace["__doc__"].strip())
        print("\nSettings, each with its default; --key=value changes one:\n")
        print(settings_block(source))
        sys.exit()
    for arg in argv:
        if not arg.startswith("-"):
            for key, value in read_file(arg, script.parent).items():
                config[key] = check(key, value, defaults, arg)
        elif arg.startswith("--") and "=" in arg:
            key, text = arg[2:].split("=", 1)
            config[key] = check(key, text, defaults, arg, from_text=True)
        else:
            sys.exit(f"error: cannot read the argument {arg!r}: write --key=value")
    namespace.update(config)
    return config


def configure_paths(namespace):
    """configure() for a script whose other arguments are paths; returns the settings and these."""
    flags = [arg for arg in sys.argv[1:] if arg.startswith("-")]
    paths = [os.path.expanduser(arg) for arg in sys.argv[1:] if arg not in flags]
    return configure(namespace, flags), paths


def settings_block(source):
    """The block of defaults in a script's source."""
    return re.search(r"^# ---- .*?(?=^# ----$)", source, re.MULTILINE | re.DOTALL)[0].strip()


def read_defaults(source):
    """{key: (value, names of the types that it may have)} of a script's settings.

    Each is `name = literal`. A default of None needs its type: `n: int | None = None`.
    """
    defaults = {}
    for node in ast.parse(settings_block(source)).body:
        value = ast.literal_eval(node.value)
        if isinstance(node, ast.AnnAssign):
            defaults[node.target.id] = value, ast.unparse(node.annotation).split(" | ")
        else:
            defaults[node.targets[0].id] = value, [type(value).__name__]
    return defaults


def read_file(path, script_dir):
    """The public names that a config file assigns. Its path is relative to the working
    directory or, failing that, to the script's folder."""
    found = [p for p in (Path(path).expanduser(), script_dir / path) if p.is_file()]
    if not found:
        sys.exit(f"error: no config file {path!r} here or in {script_dir} (flags are --key=value)")
    values = {}
    try:
        exec(found[0].read_text(), values)
    except Exception as e:  # the user's file may raise anything
        sys.exit(f"error: config file {path!r} failed: {type(e).__name__}: {e}")
    return {k: v for k, v in values.items() if not k.startswith("_") and not hasattr(v, "__name__")}


def parse(text, kinds):
    """The value that a flag's text stands for; what is no literal stays text."""
    if text == "None" and "None" in kinds:
        return None
    if "str" in kinds:
        return os.path.expanduser(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def check(key, value, defaults, origin, from_text=False):
    """`value`, if `key` takes its type; whole numbers pass where a float is asked for."""
    if key not in defaults:
        nearest = difflib.get_close_matches(key, defaults, n=1, cutoff=0)[0]
        sys.exit(f"error: unknown setting {key!r} in {origin!r}; did you mean {nearest!r}?")
    default, kinds = defaults[key]
    if from_text:
        value = parse(value, kinds)
    if type(value) is int and "int" not in kinds and "float" in kinds:
        value = float(value)
    if value == "" and default != "":
        sys.exit(f"error: {key} is empty (in {origin!r})")
    kind = "None" if value is None else type(value).__name__
    if kind not in kinds:
        sys.exit(f"error: {key} takes {' or '.join(kinds)}, not {value!r} (in {origin!r})")
    return value


def check_numbers(config, positive, any_sign):
    """Exit with one line unless all numbers are finite and at least 0, or above 0 if `positive`
    names them, or of any sign if `any_sign` does (names with spaces between them)."""
    for name, value in config.items():
        if not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            sys.exit(f"error: {name}={value} must be finite")
        if name in any_sign.split():
            continue
        if name in positive.split() and value <= 0:
            sys.exit(f"error: {name}={value} must be above 0")
        if value < 0:
            sys.exit(f"error: {name}={value} must be 0 or more")


def user_errors_in_one_line():
    """From here on take a ValueError, an OSError or an error of wandb for the user's mistake: end
    with a line instead of a traceback."""

    def hook(kind, error, traceback):
        from_wandb = kind.__module__.startswith("wandb")
        if from_wandb or isinstance(error, (ValueError, OSError, ImportError)):
            print(f"error: {error}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = hook


def describe(config, script):
    """The settings that differ from the script's defaults, as flags, in lines of text."""
    defaults = read_defaults(Path(script).read_text())
    flags = [f"--{key}={value}" for key, value in config.items() if value != defaults[key][0]]
    text = " ".join(flags) or "all settings are the defaults"
    return textwrap.fill(text, 110, break_on_hyphens=False)
