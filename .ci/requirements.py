"""Print what an extra of pyproject.toml installs, dependencies included, without the project itself."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]


def expand(extra: str) -> list[str]:
    """The extra's requirements, with references to the project's own extras replaced by what they hold."""
    found = []
    for requirement in extras[extra]:
        name, bracket, inner = requirement.partition("[")
        if name == project["name"] and bracket:
            found += [each for part in inner.rstrip("]").split(",") for each in expand(part)]
        else:
            found.append(requirement)
    return found


print(" ".join(dict.fromkeys(project["dependencies"] + expand(sys.argv[1]))))
