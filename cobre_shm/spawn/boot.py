"""First lines of the zygote, executed by ``python -c`` with names of their own.

They load the launcher's own copy of the package, wherever a search would lead, and leave
``__main__`` and ``sys.path`` as a program finds them. Arguments: this file, the socket, the
program.
"""

import importlib.util
import sys
from pathlib import Path

__all__ = ["MARK", "boot"]

# The value of ``__name__`` that makes this file act.
MARK = "zygote"


def boot() -> None:
    """Turn this fresh interpreter into the zygote, and a copy of it into each rank."""
    if not sys.flags.safe_path:
        # What -c puts there; the program has a place of its own.
        del sys.path[0]
    home = Path(sys.argv.pop(1)).parents[1]
    spec = importlib.util.spec_from_file_location(
        home.name, home / "__init__.py", submodule_search_locations=[str(home)]
    )
    if spec is None or spec.loader is None:
        sys.exit(f"{home} is not a package")
    package = sys.modules[home.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)

    from cobre_shm.spawn import direct, zygote

    direct.run(zygote.main())


if __name__ == MARK:
    boot()
