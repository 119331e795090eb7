"""The command `python -m export.torch_runtime`."""

from export.torch_runtime.cli import main

raise SystemExit(main())
