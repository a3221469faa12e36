"""Entries for attention heads."""

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.errors import InputError

from .entry import Config, Fields, whole_number, whole_number_or_null


class Heads:
    """Query heads, key/value heads, and the head size where the configuration has an entry for it."""

    def __init__(self, groups: int | None = None, head: int | None = None, has_groups: bool = True):
        """Set the defaults of a family.

        Args:
            groups: key/value heads of a configuration without that entry; ``None``: as many as query heads.
            head: head size of a configuration without that entry; ``None``: hidden size / heads.
            has_groups: whether the family has entries for key/value heads and head size.
        """
        self.names = ("num_attention_heads", *(("num_key_value_heads", "head_dim") if has_groups else ()))
        self._groups, self._head, self._has_groups = groups, head, has_groups

    def read(self, config: Config) -> Fields:
        """Read heads, groups and head size; raise ``InputError`` where they do not divide."""
        hidden, heads = whole_number(config, "hidden_size"), whole_number(config, "num_attention_heads")
        groups, head = heads, None
        if self._has_groups:
            groups = whole_number_or_null(config, "num_key_value_heads", self._groups or heads) or heads
            head = whole_number_or_null(config, "head_dim", self._head)
        if head is None and hidden % heads:
            raise InputError(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}")
        if heads % groups:
            raise InputError(f"num_attention_heads {heads} is not divisible by num_key_value_heads {groups}")
        return {
            "num_attention_heads": heads,
            "num_query_groups": groups,
            "group_query_attention": groups != heads,
            "kv_channels": hidden // heads if head is None else head,
        }

    def write(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write the entries that the family has."""
        entries: dict[str, object] = {"num_attention_heads": architecture.num_attention_heads}
        if self._has_groups:
            entries |= {"num_key_value_heads": architecture.num_query_groups, "head_dim": architecture.kv_channels}
        return entries
