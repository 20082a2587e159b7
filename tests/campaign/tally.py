"""What a campaign counts."""


class Tally:
    """Faults tried, those that were detected, those that changed nothing, and those that went wrong."""

    def __init__(self, name):
        self.name, self.detected, self.harmless, self.wrong = name, 0, 0, []

    def add(self, case, outcome):
        """`outcome` is "detected", "harmless", or what went wrong."""
        if outcome in ("detected", "harmless"):
            setattr(self, outcome, getattr(self, outcome) + 1)
        else:
            self.wrong.append((case, outcome))

    def close(self, tried):
        """Print the line of the table, and fail when anything was wrong or fewer faults were tried."""
        total = self.detected + self.harmless + len(self.wrong)
        print(f"\n| {self.name} | {total} | {self.detected} | {self.harmless} | {len(self.wrong)} |")
        assert not self.wrong, "\n".join(f"{case!r}: {outcome}" for case, outcome in self.wrong)
        assert total == tried


def tree(*roots):
    """Every file below some folders: {path: (size, time of the last change)}."""
    found = {}
    for root in roots:
        for path in root.rglob("*"):
            facts = path.lstat()
            found[path] = (facts.st_size, facts.st_mtime_ns) if not path.is_dir() else None
    return found
