"""What came of loading: how many tensors of how many, and what did not fit."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """Counts and names of one loading."""

    layout: str
    wanted: int
    """Tensors that the trunk has."""
    loaded: int
    renamed: int
    """Of the loaded ones: under another name in the file."""
    resized: tuple[str, ...] = ()
    """Positions resampled to another grid."""
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    """Tensors of the file that nothing here took."""

    @property
    def whole(self) -> bool:
        return not self.missing

    def text(self) -> str:
        """One line for the console."""
        parts = [
            f"{self.loaded} of {self.wanted} tensors of the trunk loaded ({self.layout})",
            f"{self.renamed} renamed",
            f"{len(self.resized)} resized" + _shown(self.resized),
            f"{len(self.missing)} missing" + _shown(self.missing),
            f"{len(self.unused)} of the file not used" + _shown(self.unused),
        ]
        return ", ".join(parts)


def _shown(names: tuple[str, ...], most: int = 3) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f" ({', '.join(names[:most])}{more})"
