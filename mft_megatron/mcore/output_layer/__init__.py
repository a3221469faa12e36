"""From hidden states to token losses: vocabulary-parallel cross entropy."""
