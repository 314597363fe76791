"""fvcore as the MAC counter: exact counts with our own handles, next to fvcore's default total."""

from stepping_plugin.integrations.fvcore.counting import MacCount, count_macs
from stepping_plugin.integrations.fvcore.einsum import einsum_macs

__all__ = ["MacCount", "count_macs", "einsum_macs"]
