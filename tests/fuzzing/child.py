"""The process that reads: its arguments come as JSON, its answers go to the pipe that they name."""

import json
import os
import sys
from pathlib import Path

from .reading import main

arguments = json.loads(sys.stdin.read())
keep = arguments["keep"]
with os.fdopen(arguments["out"], "w") as out:
    main(arguments["seed"], arguments["numbers"], keep and Path(keep), out)
