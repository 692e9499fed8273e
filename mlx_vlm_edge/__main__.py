"""`python -m mlx_vlm_edge` is `mlx-vlm-edge`."""

import sys

from .cli import main

sys.exit(main())
