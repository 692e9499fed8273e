"""A bundle's bytes -> its share of what iPhones let an app have, for the manifest.

Apple promises no such limit; an app asks os_proc_available_memory(). What developers measured is
about half of the memory, and about three quarters with the entitlement increased-memory-limit (on
iPadOS 26.4, less again).
"""

from typing import Any

MEMORY = (4, 6, 8, 12)  # GB: iPhone 13; 14 and 15; 15 Pro, 16 and 17; 17 Pro and Air
USUAL, ENTITLED = 0.5, 0.75  # of it, as measured by developers
ENTITLEMENT = "com.apple.developer.kernel.increased-memory-limit"


def budget(nbytes: int) -> dict[str, Any]:
    """What files that are all in memory leave of it; KV cache and activations come on top."""
    return {
        "files": nbytes,
        "entitlement": ENTITLEMENT,
        "limits": "reported by developers, not by Apple: ask os_proc_available_memory()",
        "phones": [
            {
                "memory_gb": memory,
                "limit_gb": USUAL * memory,
                "share": round(nbytes / (USUAL * memory * 1e9), 3),
                "entitled_limit_gb": ENTITLED * memory,
                "entitled_share": round(nbytes / (ENTITLED * memory * 1e9), 3),
            }
            for memory in MEMORY
        ],
    }
