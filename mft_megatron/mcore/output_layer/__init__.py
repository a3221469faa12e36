"""Hidden states to token losses: vocabulary-parallel cross entropy."""
