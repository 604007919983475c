"""
Override a script's defaults from python files and --key=value flags.

    python train.py config/train_digits.py --batch_size=32 --learning_rate=1e-3
    python train.py --help

A script keeps its defaults as plain assignments under `# ---- group` headings, then calls
`config = configure(globals())`. Files and flags apply in the order given, the last one
wins. Unlike an exec() of whatever is passed, a key that the script does not know, or a
value of another type, ends the run with one line that names it.
"""

import ast
import difflib
import io
import math
import re
import sys
import tokenize
from pathlib import Path


def configure(namespace, argv=None):
    """Apply config files and flags to a script's globals.

    namespace: the script's `globals()`, holding the block of defaults and `__file__`
    argv: arguments after the script's name; sys.argv[1:] by default
    Returns {key: value} of every setting, in the order of the block.
    Exits with one line and code 1 on an unknown key, a wrong type or an unreadable file.
    """
    script = Path(namespace["__file__"]).resolve()
    defaults = read_defaults(script.read_text())
    config = {key: default["value"] for key, default in defaults.items()}
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(namespace.get("__doc__") or "", defaults))
        sys.exit(0)
    for arg in argv:
        if not arg.startswith("-"):
            for key, value in read_file(arg, script.parent).items():
                config[key] = convert(key, value, defaults, arg)
        elif arg.startswith("--") and "=" in arg:
            key, text = arg[2:].split("=", 1)
            config[key] = convert(key, text, defaults, arg, from_text=True)
        else:
            sys.exit(f"error: cannot read the argument {arg!r}: write --key=value")
    namespace.update(config)
    return config


def read_defaults(source):
    """{key: {value, kinds, group, comment}} of the block of defaults in a script's source.

    The block starts at the first `# ---- group` line and ends at the first statement that
    is not `name = literal`. A default of None needs its type said: `n: int | None = None`.
    """
    comments, groups = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            heading = re.match(r"# -{2,} (.+?)( -*)?$", token.line.rstrip())
            (groups if heading else comments)[token.start[0]] = (
                heading[1] if heading else token.string[1:].strip()
            )
    lines = source.splitlines()
    defaults, first = {}, min(groups, default=len(lines))
    for node in ast.parse(source).body:
        if node.lineno < first:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        try:
            value = ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            break
        kinds = (
            ast.unparse(node.annotation).split(" | ")
            if isinstance(node, ast.AnnAssign)
            else [type(value).__name__]
        )
        # a comment may go on in further lines that hold nothing else and are indented
        comment, n = [comments.get(node.lineno, "")], node.lineno + 1
        while n in comments and lines[n - 1].startswith(" "):
            comment, n = comment + [comments[n]], n + 1
        group = groups[max(line for line in groups if line < node.lineno)]
        defaults[target.id] = dict(value=value, kinds=kinds, group=group, comment=" ".join(comment))
    return defaults


def read_file(path, script_dir):
    """The public names that a config file assigns; its path is relative to the working
    directory or, failing that, to the script's folder."""
    found = next((p for p in (Path(path), script_dir / path) if p.is_file()), None)
    if found is None:
        sys.exit(
            f"error: no config file {path!r} here or in {script_dir} (settings are written --key=value)"
        )
    values = {}
    try:
        exec(compile(found.read_text(), str(found), "exec"), values)
    except Exception as e:  # whatever the user's file raises is the user's to read
        sys.exit(f"error: config file {path!r} failed: {type(e).__name__}: {e}")
    return {k: v for k, v in values.items() if not k.startswith("_") and not hasattr(v, "__name__")}


def convert(key, value, defaults, origin, from_text=False):
    """`value` as one of the types that `key` takes; ints are promoted to float."""
    if key not in defaults:
        nearest = difflib.get_close_matches(key, defaults, n=1, cutoff=0)[0]
        sys.exit(
            f"error: unknown setting {key!r} in {origin!r}; did you mean {nearest!r}? (--help lists all)"
        )
    kinds = defaults[key]["kinds"]
    for kind in sorted(kinds, key=["None", "bool", "int", "float", "str"].index):
        if from_text:
            try:
                return {
                    "None": {"None": None}.__getitem__,
                    "bool": {"True": True, "False": False}.__getitem__,
                    "int": int,
                    "float": float,
                    "str": str,
                }[kind](value)
            except (KeyError, ValueError):
                continue
        if type(value).__name__ == kind or (kind == "None" and value is None):
            return value
        if kind == "float" and type(value) is int:
            return float(value)
    wanted = " or ".join({"bool": "True or False"}.get(kind, kind) for kind in kinds)
    sys.exit(f"error: {key} takes {wanted}, not {value!r} (in {origin!r})")


def check_range(config, names, low, high=math.inf, above=False):
    """Exit with one line where a setting is not in low..high, or is `low` itself if it must be above; None passes."""
    for name in names.split():
        value = config[name]
        if value is not None and not (low <= value <= high and not (above and value == low)):
            limits = f"{'above' if above else 'at least'} {low}" + (
                f" and at most {high}" if high < math.inf else ""
            )
            sys.exit(f"error: {name}={value} must be {limits}")


def help_text(doc, defaults):
    lines, group = [doc.strip()], None
    for key, default in defaults.items():
        if default["group"] != group:
            group = default["group"]
            lines += ["", f"{group}:"]
        lines.append(f"  --{key + '=' + str(default['value']):<38} {default['comment']}".rstrip())
    return "\n".join(lines)
