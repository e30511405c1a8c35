"""Print constraints.txt: what this environment holds, without slimtune itself and local build tags."""

from importlib.metadata import distributions

NOT_PINNED = {"pip", "setuptools", "wheel", "slimtune"}
FOUND = {dist.metadata["Name"]: dist.version.partition("+")[0] for dist in distributions()}

for name in sorted(FOUND, key=str.lower):
    if name.lower() not in NOT_PINNED:
        print(f"{name}=={FOUND[name]}")
