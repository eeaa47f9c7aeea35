"""A program: call ``create_communicator()`` in each of the environments given as JSON.

Prints a list: the class and the backend of the communicator, or the error's class and structured
form. It imports nothing but the package, which is installed where this runs.
"""

import json
import os
import sys

from cobre_shm import CobreError, create_communicator


def outcome(environment):
    for name in [name for name in os.environ if name.startswith("COBRE_")]:
        del os.environ[name]
    os.environ.update(environment)
    try:
        with create_communicator() as communicator:
            return {"class": type(communicator).__name__, "backend": communicator.backend}
    except CobreError as error:
        return {"error": type(error).__name__, **error.to_dict()}
    finally:
        for name in environment:
            del os.environ[name]


print(json.dumps([outcome(environment) for environment in json.loads(sys.argv[1])]))
