"""Weights in and out: `python launch/convert.py in=FILE out=FILE [to=timm|torchvision|hf|...]`."""

import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from selfsight.build import EXIT_USER_ERROR, compose


def convert(arguments: list[str]) -> int:
    """Convert what the arguments say; returns the exit status."""
    if {"-h", "--help"} & set(arguments):
        print((Path(__file__).parents[1] / "conf" / "convert.yaml").read_text(), end="")
        return 0
    try:
        for argument in arguments:
            if "=" not in argument:
                raise ValueError(f"{argument!r} is not understood: write key=value, or --help.")
        settings: Any = OmegaConf.to_container(compose("convert", arguments), resolve=True)
        for key in ("in", "out"):
            if settings[key] is None:
                raise ValueError(f"{key}= is not set: python launch/convert.py in=FILE out=FILE")
        _convert(settings)
    except ValueError as error:
        print(f"selfsight: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _convert(settings: dict[str, Any]) -> None:
    # torch is imported from here on
    from selfsight.weights.export import export
    from selfsight.weights.load import load_trunk

    loaded = load_trunk(
        str(settings["in"]),
        allow_partial=bool(settings["allow_partial"]),
        prefer=str(settings["prefer"]),
    )
    print(f"in:  {settings['in']}: {loaded.description}")
    print(f"     {loaded.report.text()}")
    for note in loaded.found.notes:
        print(f"     {note}")
    if loaded.found.licence:
        print(f"     licence: {loaded.found.licence}")
    out = Path(str(settings["out"])).expanduser()
    exported = export(loaded, out, str(settings["to"]))
    print(f"out: {out}: outputs differ by {exported.difference:.1e} of the largest")
    mean, std = list(loaded.mean), list(loaded.std)
    print(f"     images of {loaded.image_size} pixels, mean {mean}, standard deviation {std}\n")
    print(exported.snippet)


if __name__ == "__main__":
    sys.exit(convert(sys.argv[1:]))
