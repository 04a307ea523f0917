"""Turn URL lists into tar shards: `python launch/fetch.py urls=list.parquet out=/data/web`."""

import sys
from pathlib import Path

from omegaconf import OmegaConf

from selfsight.build import EXIT_USER_ERROR, compose
from selfsight.data.sources.tar_index import write_index
from selfsight.fetch.job import FetchJob
from selfsight.fetch.settings import settings_from


def fetch(arguments: list[str]) -> int:
    """Run the job that the arguments describe; returns the exit status."""
    if {"-h", "--help"} & set(arguments):
        print((Path(__file__).parents[1] / "conf" / "fetch.yaml").read_text(), end="")
        return 0
    try:
        for argument in arguments:
            if "=" not in argument:
                raise ValueError(f"{argument!r} is not understood: write key=value, or --help.")
        config = OmegaConf.to_container(compose("fetch", arguments), resolve=True)
        assert isinstance(config, dict)
        settings = settings_from({str(key): value for key, value in config.items()})
        report = FetchJob(settings, on_shard=write_index).run()
    except ValueError as error:
        print(f"selfsight: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0 if report["status"] == "complete" else 130


if __name__ == "__main__":
    sys.exit(fetch(sys.argv[1:]))
