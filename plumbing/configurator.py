"""
Override a script's defaults from python files and --key=value flags.

    python train.py config/train_digits.py --batch_size=32 --learning_rate 1e-3
    python train.py --help

A script keeps its defaults as plain assignments under `# ---- group` headings, up to a line
`# ----`, and then calls `config = configure(globals())`. Files and flags apply in the order given;
the last one wins. A key that the script does not know, or a value of another type, ends the run
with one line; what sweep tools write is taken: `--compile=true`, `--batch_size=4.0`.
"""

import ast
import contextlib
import difflib
import functools
import os
import re
import runpy
import sys
from pathlib import Path


def configure(namespace, argv=None, paths=None):
    """Apply config files and flags to a script's globals.

    namespace: the script's `globals()`, with the block of defaults and `__file__`
    argv: the arguments after the script's name; sys.argv[1:] by default
    paths: a list for the arguments that are no flags, which are config files otherwise
    Returns {key: value} of every setting, in the order of the block.
    Exits with one line and code 1 on an unknown key, a wrong type or an unreadable file.
    """
    source = Path(namespace["__file__"]).read_text()
    defaults = read_defaults(source)
    config = {key: value for key, (value, _) in defaults.items()}
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        doc = namespace["__doc__"].strip()
        block = settings_block(source)
        print(f"{doc}\n\nSettings, each with its default; --key=value changes one:\n\n{block}")
        sys.exit()
    args = iter(argv)
    for arg in args:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            if not equals:
                text = next(args, "--")
            if text.startswith("--"):
                sys.exit(f"error: cannot read the argument {arg!r}: write --key=value")
            config[key] = check(key, text, defaults, arg, from_text=True)
        elif paths is None:
            for key, value in read_file(arg).items():
                config[key] = check(key, value, defaults, arg)
        else:
            paths.append(arg)
    namespace.update(config)
    return config


def configure_paths(namespace):
    """configure() for a script whose other arguments are paths; returns the settings and these."""
    paths = []
    return configure(namespace, paths=paths), paths


def settings_block(source):
    """The block of defaults in a script's source."""
    return re.search(r"(?ms)^# ---- .*?(?=\n# ----$)", source)[0]


def read_defaults(source):
    """{key: (value, names of the types that it may have)} of a script's settings.

    Each is a line `name = literal`. A default of None needs its type: `n: int | None = None`.
    """
    defaults = {}
    setting = r"(?m)^(\w+)(?:: *(.+?))? *= *(.+)"
    for name, kinds, text in re.findall(setting, settings_block(source)):
        value = ast.literal_eval(text)
        kinds = kinds or type(value).__name__
        defaults[name] = value, kinds.split(" | ")
    return defaults


def read_file(path):
    """The public names that a config file assigns."""
    try:
        values = runpy.run_path(path)
    except Exception as e:  # the user's file may raise anything
        sys.exit(
            f"error: config file {path} failed: {type(e).__name__}: {e} (settings are --key=value)"
        )
    return {k: v for k, v in values.items() if k[0] != "_" and not hasattr(v, "__name__")}


def check(key, value, defaults, origin, from_text=False):
    """`value`, if `key` takes its type. Whole numbers pass as int and as float, and the text of a
    flag as the literal that it is, also as YAML writes it (true)."""
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults)
        hint = f"did you mean {near[0]!r}?" if near else "--help prints all"
        sys.exit(f"error: unknown setting {key!r} in {origin!r}; {hint}")
    default, kinds = defaults[key]
    if from_text and ("str" not in kinds or value in kinds):  # None can be one of them
        # what is no literal stays text, and is refused below
        with contextlib.suppress(ValueError, TypeError, SyntaxError):
            value = ast.literal_eval(value.capitalize())
    if isinstance(value, str):
        value = os.path.expanduser(value)
    if type(value) in (int, float) and value % 1 == 0:
        value = int(value) if "int" in kinds else float(value)
    if value == "" and default != "":
        sys.exit(f"error: {key} is empty (in {origin!r})")
    kind = "None" if value is None else type(value).__name__
    if kind not in kinds:
        sys.exit(f"error: {key} takes {' or '.join(kinds)}, not {value!r} (in {origin!r})")
    return value


def check_numbers(config, positive, any_sign=""):
    """Exit with one line unless all numbers are finite, at most 1e10, and at least 0, or above 0 if
    `positive` names them, or of any sign if `any_sign` does (names with spaces between them)."""
    for name, value in config.items():
        if not isinstance(value, int | float):
            continue
        if not abs(value) <= 1e10:  # nor NaN
            sys.exit(f"error: {name}={value} must be finite, and at most 1e10")
        if name in positive.split() and value <= 0:
            sys.exit(f"error: {name}={value} must be above 0")
        if value < 0 and name not in any_sign.split():
            sys.exit(f"error: {name}={value} must be 0 or more")


def set_up_console():
    """For a script: from here on a ValueError, an OSError or an error of wandb is taken for the
    user's mistake, which ends it with a line instead of a traceback. Where nobody takes what it
    prints, a full disk or a closed pipe, it goes on after one warning. Characters that the encoding
    lacks are escaped."""

    def hook(kind, error, traceback):
        if issubclass(kind, ValueError | OSError | ImportError) or "wandb" in kind.__module__:
            print(f"error: {error}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, traceback)

    def write(stream, write_text, text):
        try:
            write_text(text)
            stream.flush()
        except OSError as e:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            print(f"WARNING: cannot print: {e}", file=sys.stderr)

    sys.excepthook = hook
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where it is closed, nor in a notebook
            stream.reconfigure(errors="backslashreplace")
            stream.write = functools.partial(write, stream, stream.write)


def describe(config, script):
    """The settings that differ from the script's defaults, as flags."""
    defaults = read_defaults(Path(script).read_text())
    flags = (f"--{key}={value}" for key, value in config.items() if value != defaults[key][0])
    return " ".join(flags) or "all settings are the defaults"
