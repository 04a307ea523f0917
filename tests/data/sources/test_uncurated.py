import pytest

from selfsight.data.sources.mixture import Mixture
from selfsight.data.sources.shards import TarShards
from selfsight.data.sources.uncurated import uncurated_stream
from tests.data.tars import IMAGES, shard, write


@pytest.fixture
def sets(tmp_path):
    for name, numbers in (("web", (0, 1, 2)), ("scans", (3,))):
        for n in numbers:
            write(tmp_path / name / f"{n:06d}.tar", shard(n))
    return {"web": str(tmp_path / "web"), "scans": str(tmp_path / "scans" / "*.tar")}


def test_one_set_is_its_shards(sets):
    source = uncurated_stream(sets["web"], pieces=2, whole_index=False)
    assert isinstance(source, TarShards) and source.shards() == 3 and source.pieces == 2


def test_several_sets_are_a_mixture(sets):
    source = uncurated_stream(sets, {"web": 1, "scans": 3})
    assert isinstance(source, Mixture) and source.weights == [0.25, 0.75]
    assert [part.name.split("/")[0] for part in source.sources] == ["web", "scans"]
    by_size = uncurated_stream(sets)
    assert isinstance(by_size, Mixture) and by_size.weights == [0.75, 0.25]
    assert len(by_size) == 4 * IMAGES and by_size.read(3 * IMAGES).label == 0


def test_mistakes(sets):
    with pytest.raises(ValueError, match="weights are for several sets"):
        uncurated_stream(sets["web"], {"web": 1})
    with pytest.raises(ValueError, match=r"data.weights=\{web: 1, scans: 1\}"):
        uncurated_stream(sets, whole_index=False)
    with pytest.raises(ValueError, match="tar shards are needed"):
        uncurated_stream(None)
